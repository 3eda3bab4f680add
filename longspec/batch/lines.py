"""Bounded line reading: a stream of any length, with lines of any length, needs the memory of one line.

Takes a binary file; gives text, or the reason why a line isn't text. Knows no format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["LINE_NBYTES", "Line", "as_text", "names", "read_lines"]

LINE_NBYTES = 10_000_000
"""Ten times what the longest contexts read; a prompt of its own file may have as much."""

_CHUNK = 1 << 16
_NAME_NBYTES = 1 << 16
"""More than any system lets a path have."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its newline. fault: the reason why it isn't text; `text` is then a rough copy, or empty."""

    number: int  # from 1, as editors count
    text: str
    fault: str | None = None

    @property
    def is_blank(self) -> bool:
        return self.fault is None and not self.text.strip()


def read_lines(file: BinaryIO, most: int = LINE_NBYTES) -> Iterator[Line]:
    """The lines of the file; only a newline ends one, and a carriage return before it is removed too."""
    number = 0
    while data := file.readline(most + 2):
        number += 1
        if len(data.rstrip(b"\r\n")) > most:
            while not data.endswith(b"\n") and data:  # skip to the line's end
                data = file.readline(_CHUNK)
            yield Line(number, "", f"the line has more than {most:,} bytes")
            continue
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        text, fault = as_text(data.removesuffix(b"\n").removesuffix(b"\r"), "the line")
        yield Line(number, text, fault)


def as_text(data: bytes, name: str) -> tuple[str, str | None]:
    """The bytes as text, and the reason why they aren't, if so."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        rough = data.decode(errors="replace")
        return rough, f"{name} isn't UTF-8: byte {error.start} is 0x{data[error.start]:02x}, which is not valid there"
    if (at := text.find("\0")) >= 0:
        return text.replace("\0", ""), f"{name} isn't text: character {at} is NUL, as in binary files"
    return text, None


def names(file: BinaryIO, end: bytes) -> Iterator[bytes]:
    """The names in a list, each terminated by `end`; empty ones are left out.

    Raises:
        ValueError: one is longer than any path.
    """
    rest = b""
    while chunk := file.read(_CHUNK):
        *whole, rest = (rest + chunk).split(end)
        yield from filter(None, whole)
        if len(rest) > _NAME_NBYTES:
            raise ValueError(f"a name in it has more than {_NAME_NBYTES:,} bytes")
    if rest:
        yield rest
