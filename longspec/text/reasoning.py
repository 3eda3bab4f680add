"""Parser of reasoning sections, `<think>...</think>` and the like.

Takes a vocabulary with its markers; gives a `Section`, which splits an answer into reasoning and content. The budget of
a section is enforced by `longspec.constraints.thinking_budget`.

A section opens if the prompt ends with the begin marker, as in the templates of DeepSeek-R1 and QwQ, or if the answer
begins with it. An answer has at most one: later markers are content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from longspec.text.think_tags import Markers
from longspec.text.tokenizer import Vocabulary

__all__ = ["AFTER", "BEFORE", "INSIDE", "Place", "Reader", "Section"]

BEFORE, INSIDE, AFTER = "before", "inside", "after"


@dataclass(frozen=True, slots=True)
class Place:
    """Parser state. phase: before, inside or after the section. count: tokens since the section began, or ended."""

    phase: str
    tail: bytes = b""  # the last bytes, which may be the start of a marker
    count: int = 0
    rest: int = 0  # bytes behind the end marker in the token that completed it


class Reader:
    """State machine over tokens, without state of its own: `after` maps a state and a token to the next state."""

    def __init__(self, vocabulary: Vocabulary, markers: Markers) -> None:
        self._begin, self._end = markers.begin.encode(), markers.end.encode()
        self.spelled = lru_cache(maxsize=4096)(lambda token: vocabulary.piece(token, first=False) or b"")
        self.ending = vocabulary.encode(markers.end, add_special=False)
        self.lead = vocabulary.encode(markers.lead, add_special=False) if markers.lead else []

    def begun(self, prompt: Sequence[int]) -> Place:
        """State at the end of a prompt: inside if the prompt ends with the begin marker, else before."""
        last = b"".join(map(self.spelled, prompt[-(len(self._begin) + 8) :])).rstrip()
        return Place(INSIDE if last.endswith(self._begin) else BEFORE)

    def after(self, place: Place, token: int) -> Place:
        """State after one more token."""
        if place.phase == AFTER:
            return Place(AFTER, b"", place.count + 1)
        tail = place.tail + self.spelled(token)
        if place.phase == BEFORE:
            text = tail.lstrip()
            if text.startswith(self._begin):
                return Place(INSIDE, text[len(self._begin) :])
            return Place(BEFORE if self._begin.startswith(text) else AFTER, tail)
        at = tail.find(self._end)
        if at >= 0:
            return Place(AFTER, rest=len(tail) - at - len(self._end))
        return Place(INSIDE, tail[-len(self._end) :], place.count + 1)

    def ends(self, place: Place) -> int:
        """Number of tokens of the end marker that the sequence already ends with."""
        for n in range(len(self.ending) - 1, 0, -1):
            if place.tail.endswith(b"".join(map(self.spelled, self.ending[:n]))):
                return n
        return 0


class Section:
    """Splits one answer into reasoning and content."""

    def __init__(self, reader: Reader, markers: Markers, place: Place) -> None:
        self._reader = reader
        self._markers = markers
        self._place = place
        # Offsets in the answer's text: start and end of the reasoning, start of the content.
        self._opened: int | None = 0 if self._place.phase == INSIDE else None
        self._closed: int | None = None
        self._words: int | None = None
        self._sizes: list[int] = []  # bytes of each token of the section
        self._thought = self._said = 0  # offsets up to which reasoning and content were given
        self._began = [False, False]  # whether their leading blanks were passed over
        self._lead = markers.lead  # not yet passed over
        self.tokens = 0  # number of reasoning tokens, without the end marker's

    @property
    def is_there(self) -> bool:
        """True if the answer has a reasoning section, which may be empty."""
        return self._opened is not None

    @property
    def is_open(self) -> bool:
        """True inside the reasoning section."""
        return self._place.phase == INSIDE

    def take(self, token: int, begin: int) -> None:
        """Add a token, whose text begins at offset `begin` of the answer."""
        old, self._place = self._place, self._reader.after(self._place, token)
        piece = self._reader.spelled(token)
        phase = self._place.phase
        if old.phase == INSIDE:
            self._sizes.append(len(piece))
            self.tokens += 1
        if phase == old.phase:
            return
        if phase == INSIDE:
            self._opened = begin + _letters(piece[: len(piece) - len(self._place.tail)])
        elif old.phase == BEFORE:
            self._words = 0
        else:
            self._words = begin + _letters(piece[: len(piece) - self._place.rest])
            self._closed = self._words - len(self._markers.end)
            wanted = len(self._markers.end.encode()) + self._place.rest
            while wanted > 0 and self._sizes:
                wanted -= self._sizes.pop()
                self.tokens -= 1

    def parts(self, text: str, *, over: bool) -> tuple[str, str]:
        """New reasoning and new content since the last call, as far as they are final.

        text: the answer so far. over: the answer has ended. Blanks around the reasoning, and before the content that
        follows it, are left out, and what leads to the content.
        """
        thought = said = ""
        if self._opened is not None:
            end = self._closed
            if end is None:
                end = len(text) - (0 if over else self._held(text))
            thought = text[max(self._thought, self._opened) : end].rstrip()
            self._thought = max(self._thought, self._opened) + len(thought)
            thought = self._stripped(0, thought)
        words = 0 if self._words is None and over and self._opened is None else self._words
        if words is not None and self._lead:
            behind = text[words:]
            if self._lead.startswith(behind) and not over:
                return thought, ""
            if behind.startswith(self._lead):
                self._words = words = words + len(self._lead)
            self._lead = ""
        if words is not None:
            begin = max(self._said, words)
            said = text[begin:]
            self._said = begin + len(said)
            if self._opened is not None:
                said = self._stripped(1, said)
        return thought, said

    def _held(self, text: str) -> int:
        """Number of characters at the end of the text that may be the start of the end marker."""
        end = self._markers.end
        return next((n for n in range(min(len(end) - 1, len(text)), 0, -1) if text.endswith(end[:n])), 0)

    def _stripped(self, part: int, text: str) -> str:
        if not self._began[part]:
            text = text.lstrip()
            self._began[part] = bool(text)
        return text


def _letters(data: bytes) -> int:
    return len(data.decode(errors="replace"))
