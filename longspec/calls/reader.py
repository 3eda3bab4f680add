"""An answer's text, read while it grows: what is said, and the calls with their arguments.

Takes pieces of text; gives for each what is final now. A format's generator does the reading and yields wherever it
needs more text. Whatever a model writes is read: what is no call is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import Any

from longspec.calls.call import CallPart

__all__ = ["Reader", "json_call"]

_LONGEST_HEAD = 400
"""Characters before a call's arguments, its name among them: what has more isn't a call."""

_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class Reader:
    """reads: the generator that reads; it gets this object."""

    def __init__(self, reads: Callable[[Reader], Generator[None]]) -> None:
        self.text = ""  # not yet read
        self.over = False
        self.count = 0  # calls begun
        self._said = ""
        self._parts: list[CallPart] = []
        self._behind = False  # a call, whose blanks aren't said
        self._reading = reads(self)
        next(self._reading, None)

    def take(self, text: str, *, over: bool = False) -> tuple[str, tuple[CallPart, ...]]:
        """Add text; returns what is said, and parts of calls. over: the answer has ended."""
        self.text += text
        self.over = over
        next(self._reading, None)
        if over:
            self.say(self._pass(len(self.text)))
        said, parts = self._said, tuple(self._parts)
        self._said, self._parts = "", []
        return said, parts

    # --- for the generators

    def say(self, text: str) -> None:
        """Text of the answer; blanks behind a call are left out."""
        text = text.lstrip() if self._behind else text
        self._behind = self._behind and not text
        self._said += text

    def begin(self, name: str) -> None:
        """A call of this name begins."""
        self._parts.append(CallPart(self.count, name, ""))
        self.count += 1
        self._behind = True

    def argue(self, text: str) -> None:
        """More of the last call's arguments."""
        if text:
            self._parts.append(CallPart(self.count - 1, "", text))

    def say_until(self, mark: str) -> Generator[None, None, bool]:
        """Say what stands before the mark, and pass it; whether there is one. Blanks beside calls aren't said."""
        while (at := self.text.find(mark)) < 0 and not self.over:
            self._say(self._held(mark))
            yield
        if at < 0:
            self._say(0 if not self.count else len(self.text) - len(self.text.rstrip()))
            self.text = ""
            return False
        self._say(len(self.text) - len(self.text[:at].rstrip()))
        self._pass(self.text.find(mark) + len(mark))
        return True

    def until(self, mark: str) -> Generator[None, None, str | None]:
        """What stands before the mark, which is passed; None where the answer ends before it."""
        while (at := self.text.find(mark)) < 0:
            if self.over:
                return None
            yield
        found = self._pass(at)
        self._pass(len(mark))
        return found

    def skip(self, pattern: re.Pattern[str], width: int) -> Generator[None, None, bool]:
        """Pass what the pattern matches, of at most `width` characters behind blanks; whether it did."""
        while (match := pattern.match(self.text)) is None:
            if self.over or len(self.text.lstrip()) >= width:
                return False
            yield
        self._pass(match.end())
        return True

    def object(self) -> Generator[None]:
        """Pass a JSON object on as arguments, as it comes."""
        depth, quoted, escaped = 0, False, False
        while True:
            for i, letter in enumerate(self.text):
                if escaped:
                    escaped = False
                elif quoted:
                    quoted, escaped = letter != '"', letter == "\\"
                elif letter == '"':
                    quoted = True
                elif letter in "{[":
                    depth += 1
                elif letter in "}]":
                    depth -= 1
                    if not depth:
                        self.argue(self._pass(i + 1))
                        return
            self.argue(self._pass(len(self.text)))
            if self.over:
                return
            yield

    def _say(self, held: int) -> None:
        """Say all but the last `held` characters."""
        self.say(self._pass(len(self.text) - held))

    def _held(self, mark: str) -> int:
        """Characters at the end that may belong to the mark, or are blanks that may stand before it."""
        ends = range(min(len(mark) - 1, len(self.text)), 0, -1)
        held = next((n for n in ends if self.text.endswith(mark[:n])), 0)
        before = self.text[: len(self.text) - held]
        return held + len(before) - len(before.rstrip())

    def _pass(self, length: int) -> str:
        passed, self.text = self.text[:length], self.text[length:]
        return passed


def json_call(reader: Reader, end: str | None, is_known: Callable[[str], bool]) -> Generator[None, None, bool]:
    """Read `{"name": ..., "arguments": {...}`, up to the arguments' end; whether a call stood there.

    Where the arguments come first, or as a text of JSON, the call is read as a whole, up to `end`.
    """
    while (head := _HEAD.match(reader.text)) is None and not reader.over:
        if (end is not None and end in reader.text) or (end is None and len(reader.text) > _LONGEST_HEAD):
            break
        yield
    if head is not None and is_known(name := json.loads(head[1])):
        reader.begin(name)
        reader.text = reader.text[head.end() :]
        yield from reader.object()
        return True
    whole, found, rest = reader.text.partition(end) if end else (reader.text, "", "")
    call = _whole(whole)
    if call is None or not is_known(call[0]):
        return False
    reader.begin(call[0])
    reader.argue(call[1])
    reader.text = found + rest
    return True


def _whole(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is written otherwise; None where it is none."""
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
