"""What a model thinks before it answers: where its text stands, and which of it is thought.

Takes a vocabulary, whose markers say how a section of reasoning begins and ends; gives a `Section`, which tells an
answer's thoughts from its words. What holds the section to a budget is `longspec.constraints.thinking_budget`.

A section is open when the prompt ends with its beginning, as the templates of DeepSeek-R1 and QwQ have it, or when the
answer begins with it. An answer has one at most: markers that come later are part of it.
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
    """Where a text stands. count: tokens since the section began, or since it ended."""

    phase: str
    tail: bytes = b""  # what a marker may have begun with
    count: int = 0
    rest: int = 0  # bytes behind the marker in the token that ended it


class Reader:
    """Follows tokens from place to place."""

    def __init__(self, vocabulary: Vocabulary, markers: Markers) -> None:
        self._begin, self._end = markers.begin.encode(), markers.end.encode()
        self.spelled = lru_cache(maxsize=4096)(lambda token: vocabulary.piece(token, first=False) or b"")
        self.ending = vocabulary.encode(markers.end, add_special=False)

    def begun(self, prompt: Sequence[int]) -> Place:
        """At the end of a prompt: inside where it ends with the beginning of a section."""
        last = b"".join(map(self.spelled, prompt[-(len(self._begin) + 8) :])).rstrip()
        return Place(INSIDE if last.endswith(self._begin) else BEFORE)

    def after(self, place: Place, token: int) -> Place:
        """With one more token."""
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
        """How many of the tokens that end a section the text already ends with."""
        for n in range(len(self.ending) - 1, 0, -1):
            if place.tail.endswith(b"".join(map(self.spelled, self.ending[:n]))):
                return n
        return 0


class Section:
    """One answer in two: its thoughts, and its words."""

    def __init__(self, reader: Reader, markers: Markers, place: Place) -> None:
        self._reader = reader
        self._markers = markers
        self._place = place
        self._opened: int | None = 0 if self._place.phase == INSIDE else None  # offsets in the text: of the thoughts
        self._closed: int | None = None
        self._words: int | None = None  # and of the words
        self._sizes: list[int] = []  # bytes of each token of the section
        self._thought = self._said = 0  # how far each was given
        self._began = [False, False]  # the blanks before them were passed over
        self.tokens = 0  # of the thoughts

    @property
    def is_there(self) -> bool:
        """The answer has thoughts, though they may be empty."""
        return self._opened is not None

    @property
    def is_open(self) -> bool:
        """What is written now is thought."""
        return self._place.phase == INSIDE

    def take(self, token: int, begin: int) -> None:
        """The answer has one more token, whose text begins at this offset."""
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
        """What is certain of thoughts and words and wasn't given before; text: all of the answer that may be shown.

        The blanks around the thoughts, and before the words that follow them, are left out.
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
        if words is not None:
            begin = max(self._said, words)
            said = text[begin:]
            self._said = begin + len(said)
            if self._opened is not None:
                said = self._stripped(1, said)
        return thought, said

    def _held(self, text: str) -> int:
        """Letters at the end of the text that may turn out to be the marker's."""
        end = self._markers.end
        return next((n for n in range(min(len(end) - 1, len(text)), 0, -1) if text.endswith(end[:n])), 0)

    def _stripped(self, part: int, text: str) -> str:
        if not self._began[part]:
            text = text.lstrip()
            self._began[part] = bool(text)
        return text


def _letters(data: bytes) -> int:
    return len(data.decode(errors="replace"))
