"""The process around a command: its streams, its signals, and the one sentence and exit code that every error becomes.

Knows nothing of options or models; docs/cli.md is the contract that it keeps. Heavy modules are imported by the
commands, and typer only once signals are caught.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from longspec.cli.io import signals
from longspec.cli.io.progress import printable
from longspec.errors import LongspecError

__all__ = ["guarded", "main"]

CLOSED_PIPE = 128 + 13
"""What a shell reports of a program that SIGPIPE ended, as most programs are that lose their reader."""


def main() -> NoReturn:
    """The program `longspec`."""
    signals.catch()
    _set_threads()
    try:
        _prepare_streams()
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # the libraries' advice to programmers
        code = guarded(sys.argv[1:])
    except signals.Interrupted as end:  # a second time, while the first was being answered
        code = end.exit_code
    signals.ignore()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    # Not sys.exit: taking torch apart costs 0.7 s at the end of every answer, and a thread may wait for the network.
    os._exit(code)


def guarded(arguments: Sequence[str]) -> int:
    """Run one command; its exit code. What went wrong has been said on stderr, in a sentence."""
    try:
        from longspec.cli.app import invoke

        code = invoke(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except signals.Interrupted as end:
        return end.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return CLOSED_PIPE
    except Exception as error:  # noqa: BLE001  the last resort, and it says what it is
        if (interrupted := signals.noted()) is not None:  # half an import raises what it likes
            return interrupted.exit_code
        _say(error)
        return error.exit_code if isinstance(error, LongspecError) else 1
    return code


def _set_threads() -> None:
    """What OpenMP is told before torch is loaded, where nobody else told it."""
    # Threads that wait for each other spin for 10,000 turns and then sleep; the system's default is 30 times as many.
    # Alone on two cores both decode 32 tokens/s (the default model, bf16), beside one other busy process 10 and 1.4.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _prepare_streams() -> None:
    """A closed stream's number is taken, lest the next file that is opened gets it; text is UTF-8 everywhere."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _say(error: Exception) -> None:
    with suppress(OSError, AttributeError):
        if os.environ.get("LONGSPEC_DEBUG", "") not in ("", "0"):
            traceback.print_exception(error, file=sys.stderr)
        print(f"longspec: {' '.join(printable(_sentence(error)).split())}", file=sys.stderr, flush=True)


def _sentence(error: Exception) -> str:
    if isinstance(error, LongspecError):
        return str(error)
    message = str(error).split("\n\n")[0].strip().rstrip(".") or "nothing more is known"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "t allocate memory" in message:
        return f"The memory ran out ({message}); use a smaller model or fewer tokens."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'A file'} can't be used: {error.strerror}."
    kind = type(error).__name__
    return f"{kind}: {message}. This is a bug in longspec; please report it with what LONGSPEC_DEBUG=1 shows."


if __name__ == "__main__":
    main()
