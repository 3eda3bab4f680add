"""The prompt: an argument, files and standard input as one text.

Takes names and bytes from a user, who may have named a program or an endless device; gives text that isn't empty.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence

from longspec.errors import UsageError

__all__ = ["checked", "read_prompt"]

_STDIN = 0
_PATIENCE_SECONDS = 2.0
_MOST_NBYTES = 64 << 20
"""A hundred times what the longest contexts read: an endless device is refused before it fills the memory."""


def read_prompt(argument: str | None, files: Sequence[str], *, no_stdin: bool, say: Callable[[str], None]) -> str:
    """The argument, then the files, then standard input, with a blank line between them.

    Line ends at the end of a file or of standard input are dropped, as by the shell's `$(...)`. `say` is told, once,
    that standard input is silent.

    Raises:
        UsageError: a part can't be read, isn't text, or all of them are empty.
    """
    asked = argument == "-" or "-" in files
    if asked and no_stdin:
        raise UsageError("- asks for standard input and --no-stdin forbids it; give one of them.")
    parts = [] if argument in (None, "-") else [checked(argument or "", "the prompt")]
    parts += [_text(_read_file(name), name) for name in files if name != "-"]
    if asked or not (no_stdin or sys.stdin is None or os.isatty(_STDIN)):
        parts.append(_text(_read_stdin(say), "standard input"))
    prompt = "\n\n".join(part for part in parts if part)
    if not prompt.strip():
        raise UsageError("The prompt is empty; give it as an argument, with -f FILE, or on standard input.")
    return prompt


def checked(argument: str, name: str) -> str:
    """An argument as text in UTF-8, also where the locale made Python read its bytes as something else."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return _decoded(os.fsencode(argument), name)
    return argument


def _text(data: bytes, name: str) -> str:
    if len(data) > _MOST_NBYTES:
        raise UsageError(f"{name} holds more than {_MOST_NBYTES >> 20} MiB, which is no prompt for any model.")
    text = _decoded(data, name).removeprefix("\ufeff")
    if (at := text.find("\0")) >= 0:
        raise UsageError(f"{name} isn't text: character {at} is NUL, as in binary files; give text in UTF-8.")
    return text.rstrip("\r\n")


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} isn't text: byte {error.start} is 0x{data[error.start]:02x}, which is not valid UTF-8 there; "
            "give text in UTF-8."
        ) from None


def _read_file(name: str) -> bytes:
    try:
        with open(name, "rb") as file:
            return file.read(_MOST_NBYTES + 1)
    except OSError as error:
        raise UsageError(f"{name} can't be read: {error.strerror}; give a file with -f.") from error


def _read_stdin(say: Callable[[str], None]) -> bytes:
    if sys.stdin is None:
        raise UsageError("Standard input is closed, and - asks for it; give the prompt as an argument or with -f FILE.")
    patience: float | None = _PATIENCE_SECONDS
    if os.isatty(_STDIN):
        say("type the prompt; Ctrl-D on a line of its own ends it")
        patience = None
    data = bytearray()
    while len(data) <= _MOST_NBYTES:
        try:
            if not select.select([_STDIN], [], [], patience)[0]:
                say("waiting for standard input to end; --no-stdin does without it")
                patience = None
                continue
            chunk = os.read(_STDIN, 1 << 20)
        except BlockingIOError:
            continue
        except OSError as error:
            raise UsageError(f"Standard input can't be read: {error.strerror}; --no-stdin does without it.") from error
        if not chunk:
            break
        data += chunk
    return bytes(data)
