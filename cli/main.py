"""The process around a command: its streams, its signals, and the message and exit code of every error.

Knows nothing of options or models; docs/cli.md is its specification. Heavy modules are imported by the commands, and
typer only once signals are caught.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from longspec.cli.io import signals
from longspec.cli.io.progress import folded, printable
from longspec.errors import LongspecError

__all__ = ["guarded", "main"]

CLOSED_PIPE = 128 + 13
"""What a shell reports of a program that SIGPIPE ended, as most programs are that lose their reader."""

_MOST = 2000  # letters of an error: a name in a stranger's file may have megabytes


def main() -> NoReturn:
    """The entry point of the program `longspec`."""
    signals.catch()
    gc.set_threshold(50_000)  # what imports make stays: to look for garbage in it every 700 objects holds them up
    try:
        _prepare_streams()
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # libraries' warnings are for programmers
        code = guarded(sys.argv[1:])
    except signals.Interrupted as end:  # a second signal, while the first was being handled
        code = end.exit_code
    signals.ignore()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    # Not sys.exit: torch's teardown costs 0.7 s at the end of every answer, and a thread may wait for the network.
    os._exit(code)


def guarded(arguments: Sequence[str]) -> int:
    """Run one command; its exit code. An error has been printed on stderr, in a sentence."""
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
    except Exception as error:  # noqa: BLE001  the last resort, which prints the error's type
        if (interrupted := signals.noted()) is not None:  # an interrupted import may raise anything
            return interrupted.exit_code
        _say(error)
        return error.exit_code if isinstance(error, LongspecError) else 1
    return code


def _prepare_streams() -> None:
    """Reopen closed standard streams, lest the next opened file gets their number; text is UTF-8 everywhere."""
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
        said = " ".join(printable(_sentence(error)[: 2 * _MOST]).split())
        line = f"longspec: {said if len(said) <= _MOST else said[:_MOST] + '...'}"
        print(folded(line), file=sys.stderr, flush=True)


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
