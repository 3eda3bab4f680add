"""Line continuations and substitutions of a shell text, found by its letters alone.

Takes a text; gives texts. What bash_ast.py's grammar sees by itself isn't its task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["continued", "readable", "substitutions", "unescaped"]

_CONTINUES = re.compile(r"\\(.)|'[^']*'|(?:^|(?<=[\s;]))#[^\n]*|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
_OPENS = re.compile(r"\\.|`|\$\(", re.DOTALL)
_COPROC = re.compile(
    r"(^|[;&|({\n]\s*|\b(?:then|do|else)\s+)coproc\s+(?:\w+\s+)?(?=[({]|\[\[|(?:while|until|for|if|case|select)\b)"
)
_CLOSES = re.compile(r"((?:\\.|[^`\\])*)`", re.DOTALL)


def continued(text: str) -> str:
    """The text without line continuations, as the shell reads it; those in single quotes and comments stay."""
    return _CONTINUES.sub(_joined, text) if "\\\n" in text else text


def _joined(match: re.Match[str]) -> str:
    if match[0].startswith('"'):
        return re.sub(r"\\(.)", lambda inner: "" if inner[1] == "\n" else inner[0], match[0], flags=re.DOTALL)
    return "" if match[1] == "\n" else match[0]


def readable(text: str) -> str:
    """The text without what the grammar takes for arguments: `coproc NAME` before a group or a loop, the 0 of `0<`, and
    a backslash at the beginning of a here-document, before which a line is put that does nothing, `:`.
    """
    return re.sub(r"(<<[^\n]*\n)(?=\s*\\)", r"\1:\n", re.sub(r"(?<=\s)0(?=<)", "", _COPROC.sub(r"\1", text)))


def unescaped(text: str) -> str:
    """The text without backslashes before the first letter of a line, which the grammar takes for a part of the line
    before: an escaped letter is that letter.
    """
    return re.sub(r"(^|\n)([ \t]*)\\(?=\w)", r"\1\2", text)


def substitutions(text: str) -> Iterator[str]:
    """The commands in backquotes and in `$(...)` of a text in which quotes have no meaning: a here-document's, or a
    word within an expansion.
    """
    at = 0
    while (match := _OPENS.search(text, at)) is not None:
        at = match.end()
        if match[0] == "`":
            end = _CLOSES.match(text, at)
            at = end.end() if end else len(text)
            yield re.sub(r"\\([`\\$])", r"\1", end[1] if end else text[match.end() :])
        elif match[0] == "$(" and not text.startswith("(", at):  # not arithmetic
            start, depth = at, 1
            while at < len(text) and depth:
                depth += {"(": 1, ")": -1}.get(text[at], 0)
                at += 1
            yield text[start:at] if depth else text[start : at - 1]
