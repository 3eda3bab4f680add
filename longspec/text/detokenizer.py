"""Incremental detokenization: from token ids to text, up to the first stop string.

Takes tokens one by one and a vocabulary; knows no model and no session. Streamed and complete answers both go through
`TextStream`, so that they can't differ. The text is that of the tokenizer's own decoder, except for byte tokens
(`<0xE2>`) that together aren't UTF-8: only the invalid bytes become U+FFFD, as in a byte-level vocabulary, where that
decoder would replace the whole run of them. Offsets are in characters, from the answer's first token.
"""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from longspec.errors import UsageError
from longspec.text.tokenizer import Vocabulary

__all__ = ["StopFinder", "TextStream", "Transcript", "decode"]


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
    cut into pieces. Without stop strings it passes all text.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        if "" in self._stops:
            raise UsageError("A stop string is empty, which would end every text at once; give at least one character.")
        beginnings = {stop[:n] for stop in self._stops for n in range(1, len(stop))}
        self._beginnings = sorted(beginnings, key=len, reverse=True)
        self._held = ""
        self._shown = 0
        self.found: int | None = None  # offset of the stop string's first character, where the text ends

    def push(self, text: str) -> str:
        """Add text; returns the text that may be shown now, empty once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, stop = min(ends, key=lambda each: each[0])  # of equal ends the longest, since `_stops` is sorted
            self.found = self._shown + end - len(stop)
            keep = end - len(stop)
            self._held = ""
        else:
            self._held = next((each for each in self._beginnings if text.endswith(each)), "")
            keep = len(text) - len(self._held)
        self._shown += keep
        return text[:keep]

    def close(self) -> str:
        """The text that is still held back, at the end of the answer."""
        held, self._held = self._held, ""
        self._shown += len(held)
        return held


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
