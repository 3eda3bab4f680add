"""The prompt: an argument, files and standard input as one text, or standard input line by line.

Takes names and bytes from the user, possibly of a binary or an endless device; gives non-empty text.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence

from longspec.errors import UsageError

__all__ = ["checked", "joined", "read_head", "read_lines", "read_prompt", "text_of"]

_STDIN = 0
_PATIENCE_SECONDS = 2.0
_MOST_NBYTES = 64 << 20
"""A hundred times what the longest contexts read: an endless device is refused before it fills the memory."""


def read_prompt(argument: str | None, files: Sequence[str], *, no_stdin: bool, say: Callable[[str], None]) -> str:
    """The argument, then the files, then standard input, with a blank line between them.

    Line ends at the end of a file or of standard input are dropped, as in the shell's `$(...)`. say: called once if
    standard input sends nothing.

    Raises:
        UsageError: a part can't be read, isn't text, or all of them are empty.
    """
    reads_stdin = argument == "-" or "-" in files
    if reads_stdin and no_stdin:
        raise UsageError("- asks for standard input and --no-stdin forbids it; give one of them.")
    parts = [] if argument in (None, "-") else [checked(argument or "", "the prompt")]
    parts += [_text(_read_file(name), name) for name in files if name != "-"]
    if reads_stdin or not (no_stdin or sys.stdin is None or os.isatty(_STDIN)):
        parts.append(_text(b"".join(_chunks(say)), "standard input"))
    prompt = joined(parts)
    if not prompt.strip():
        raise UsageError("The prompt is empty; give it as an argument, with -f FILE, or on standard input.")
    return prompt


def read_head(argument: str | None, files: Sequence[str]) -> str:
    """The text before each line where lines are answered one by one: the argument, then the files.

    Raises:
        UsageError: a part can't be read, or isn't text.
    """
    parts = [] if argument in (None, "-") else [checked(argument or "", "the prompt")]
    return joined(parts + [_text(_read_file(name), name) for name in files if name != "-"])


def read_lines(say: Callable[[str], None]) -> Iterator[bytes]:
    """The lines of standard input as they arrive, without their ends; the last one may have none.

    Raises:
        UsageError: standard input can't be read, or a line is longer than any prompt.
    """
    line_so_far = bytearray()
    for chunk in _chunks(say, endless=True):
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield bytes(line_so_far + line).removesuffix(b"\r")
            line_so_far.clear()
        line_so_far += rest
        if len(line_so_far) > _MOST_NBYTES:
            raise UsageError(
                f"A line of standard input holds more than {_MOST_NBYTES >> 20} MiB; is it text, one prompt a line?"
            )
    if line_so_far:
        yield bytes(line_so_far).removesuffix(b"\r")


def text_of(line: bytes, name: str) -> str:
    """A line's text.

    Raises:
        UsageError: it isn't UTF-8, or holds NUL.
    """
    return _text(line, name)


def joined(parts: Sequence[str]) -> str:
    """The parts that aren't empty, with a blank line between them."""
    return "\n\n".join(part for part in parts if part)


def checked(argument: str, name: str) -> str:
    """An argument as UTF-8 text, even where Python decoded its bytes by another locale."""
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


def _chunks(say: Callable[[str], None], *, endless: bool = False) -> Iterator[bytes]:
    """Chunks of standard input as they arrive; unless endless, not much more than a prompt's limit."""
    if sys.stdin is None:
        raise UsageError("Standard input is closed, and it was asked for; give an argument or -f FILE.")
    patience: float | None = _PATIENCE_SECONDS
    if os.isatty(_STDIN):
        what = "one prompt a line; Ctrl-D ends them" if endless else "the prompt; Ctrl-D on a line of its own ends it"
        say(f"type {what}")
        patience = None
    nbytes = 0
    while endless or nbytes <= _MOST_NBYTES:
        try:
            if not select.select([_STDIN], [], [], patience)[0]:
                end = "" if endless else " to end; --no-stdin does without it"
                say(f"waiting for standard input{end}")
                patience = None
                continue
            chunk = os.read(_STDIN, 1 << 20)
        except BlockingIOError:
            continue
        except OSError as error:
            raise UsageError(f"Standard input can't be read: {error.strerror}; --no-stdin does without it.") from error
        if not chunk:
            break
        nbytes += len(chunk)
        patience = None if endless else patience
        yield chunk
