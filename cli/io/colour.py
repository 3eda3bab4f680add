"""Colours for the characters of an answer that came from a draft.

Takes the offset of each token in the text and whether it was drafted; held-back text is coloured when it is printed.
A character of several tokens has the colour of the last.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["can_colour", "coloured"]

_DRAFTED, _PLAIN = "\x1b[36m", "\x1b[0m"


def can_colour() -> bool:
    """Whether standard output is a terminal with colours, and NO_COLOR isn't set."""
    return os.isatty(1) and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb")


def coloured(text: str, offset: int, begins: Sequence[int], drafted: Sequence[bool]) -> str:
    """The answer's characters from `offset` on, those of drafted tokens in colour.

    begins: each token's offset in the answer. drafted: per token; tokens beyond its end weren't.
    """
    parts, end = [], offset + len(text)
    while offset < end:
        token = bisect_right(begins, offset) - 1
        until = min(end, begins[token + 1]) if token + 1 < len(begins) else end
        part = text[len(text) - (end - offset) : len(text) - (end - until)]
        parts.append(f"{_DRAFTED}{part}{_PLAIN}" if 0 <= token < len(drafted) and drafted[token] else part)
        offset = until
    return "".join(parts).replace(_PLAIN + _DRAFTED, "")
