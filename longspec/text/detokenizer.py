"""Incremental detokenization: from token ids to text, up to the first stop string.

Takes tokens one by one and a vocabulary; knows no model and no session. Streamed and complete answers both go through
`TextStream`, so that they can't differ. The text is that of the tokenizer's own decoder, except for byte tokens
(`<0xE2>`) that together aren't UTF-8: only the invalid bytes become U+FFFD, as in a byte-level vocabulary, where that
decoder would replace the whole run of them. Offsets are in characters, from the answer's first token.
"""

from __future__ import annotations

import codecs
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from longspec.errors import UsageError
from longspec.text.tokenizer import Vocabulary

__all__ = ["LONGEST_STOP", "MOST_STOPS", "StopFinder", "TextStream", "Transcript", "decode"]

MOST_STOPS = 100
"""Stop strings of one answer."""

LONGEST_STOP = 1000
"""Letters of a stop string."""


def decode(vocabulary: Vocabulary, tokens: Iterable[int]) -> str:
    """Text of an answer's tokens, without special tokens and without an incomplete last character."""
    return "".join(map(TextStream(vocabulary).push, tokens))


class TextStream:
    """Incremental decoder: gives whole characters, as soon as later tokens can't change them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._held = b""
        self._first = True
        self.length = 0  # characters given so far
        self.begins: list[int] = []
        """Offset of each token's text; tokens that are parts of one character have the character's offset."""

    def push(self, token: int) -> str:
        """Add a token; returns the characters that are final now. Bytes of an incomplete character are held back."""
        piece = self._vocabulary.piece(token, first=self._first)
        begin, text = self.length, ""
        if piece is not None:
            self._first = False
            # If the new bytes don't continue the held ones, those become a U+FFFD, and this token begins behind it.
            begin += len((self._held + piece[:1]).decode(errors="replace")) > 1
            data = self._held + piece
            text, used = codecs.utf_8_decode(data, "replace", False)
            self._held = data[used:]
            lost = self._held.decode(errors="replace")
            if len(lost) > 1:  # half a surrogate pair, which isn't valid UTF-8: Python's decoder waits for the rest
                text, self._held = text + lost, b""
        self.begins.append(begin)
        self.length += len(text)
        return text


class StopFinder:
    """Finds the first stop string in a text that comes in pieces, and holds back text that may belong to one.

    The first stop string is the one that ends first, and of several that end together the longest, however the text is
    cut into pieces. Without stop strings it passes all text. Its memory is some bytes for each of their letters.

    Raises:
        UsageError: a stop string is empty or too long, or there are too many.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        every = set(stops)
        if "" in every:
            raise UsageError("A stop string is empty, which would end every text at once; give at least one character.")
        longest = max(map(len, every), default=0)
        if len(every) > MOST_STOPS or longest > LONGEST_STOP:
            raise UsageError(
                f"There are {len(every):,} stop strings of up to {longest:,} letters; {MOST_STOPS} of {LONGEST_STOP:,} "
                "are the most."
            )
        self._searches = [_Search(stop) for stop in every]
        self._held = ""
        self._shown = 0
        self.found: int | None = None  # offset of the stop string's first character, where the text ends

    def push(self, text: str) -> str:
        """Add text; returns the text that may be shown now, empty once a stop string was found."""
        if self.found is not None:
            return ""
        ends = [(end, -len(each.stop)) for each in self._searches if (end := each.push(text)) is not None]
        held = len(self._held)
        text = self._held + text
        if ends:
            end, length = min(ends)  # of equal ends the longest
            keep = held + end + length
            self.found = self._shown + keep
            self._held = ""
        else:
            keep = len(text) - max((each.matched for each in self._searches), default=0)
            self._held = text[keep:]
        self._shown += keep
        return text[:keep]

    def close(self) -> str:
        """The text that is still held back, at the end of the answer."""
        held, self._held = self._held, ""
        self._shown += len(held)
        return held


class _Search:
    """Search of one stop string in a text that comes in pieces, by Knuth, Morris and Pratt."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0  # letters of the stop string that the text ends with
        self._borders = array("H", [0])  # of each beginning: its longest proper beginning that also ends it
        for letter in stop[1:]:
            self._borders.append(self._next(self._borders[-1], letter))

    def push(self, text: str) -> int | None:
        """The offset in the piece at which the stop string first ends; None if it doesn't."""
        at = 0
        while at < len(text):
            if not self.matched:
                at = text.find(self.stop[0], at)
                if at < 0:
                    break
            self.matched = self._next(self.matched, text[at])
            at += 1
            if self.matched == len(self.stop):
                return at
        return None

    def _next(self, matched: int, letter: str) -> int:
        while matched and self.stop[matched] != letter:
            matched = self._borders[matched - 1]
        return matched + (self.stop[matched] == letter)


class Transcript:
    """Text of one answer during generation: tokens in, text out, up to the first stop string.

    If `stopped` after a `push`, only the first `kept` tokens belong to the answer. Otherwise `close` gives the rest of
    the text at its end.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Iterable[str] = ()) -> None:
        self._stream = TextStream(vocabulary)
        self._finder = StopFinder(stops)

    @property
    def stopped(self) -> bool:
        """True once a stop string was found; tokens pushed later aren't in the text."""
        return self._finder.found is not None

    @property
    def begins(self) -> Sequence[int]:
        """Offset in the text of each pushed token."""
        return self._stream.begins

    @property
    def kept(self) -> int:
        """Number of pushed tokens that belong to the text: all, or those that begin before the stop string.

        It falls when a stop string is found that began in an earlier step.
        """
        begins, found = self._stream.begins, self._finder.found
        return len(begins) if found is None else bisect_left(begins, found)

    def push(self, token: int) -> str:
        """Add a token; returns the text that may be shown now."""
        return "" if self.stopped else self._finder.push(self._stream.push(token))

    def close(self) -> str:
        """The text that is still held back, at the end of the answer; an incomplete last character is dropped."""
        return self._finder.close()
