"""Token ids back to characters: the text that is certain so far, up to the first stop string.

Takes tokens one by one and the vocabulary that spells them; knows no model and no session. All text leaves through
`TextStream`, a whole answer too, so a stream can't differ from its end. It is what the tokenizer's own decoder gives,
except for byte tokens (`<0xE2>`) that aren't UTF-8 together: there only the broken bytes become U+FFFD, as in a
byte-level vocabulary, where that decoder would take back the whole run of them. Offsets count characters of the answer,
from its first token.
"""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from longspec.errors import UsageError
from longspec.text.tokenizer import Vocabulary

__all__ = ["StopFinder", "TextStream", "Transcript", "decode"]


def decode(vocabulary: Vocabulary, tokens: Iterable[int]) -> str:
    """The text of an answer's tokens, without special tokens and without an incomplete last character."""
    return "".join(map(TextStream(vocabulary).push, tokens))


class TextStream:
    """The text of tokens that come one by one, in whole characters, each given once nothing can change it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._held = b""
        self._first = True
        self.length = 0  # characters given
        self.begins: list[int] = []
        """For each token, the offset at which its text begins; all parts of one character begin where it does."""

    def push(self, token: int) -> str:
        """The characters that are certain with this token; bytes of an incomplete one are held until it is complete."""
        piece = self._vocabulary.piece(token, first=self._first)
        begin, text = self.length, ""
        if piece is not None:
            self._first = False
            # Bytes that can't continue the held ones turn those into a U+FFFD, and begin behind it.
            begin += len((self._held + piece[:1]).decode(errors="replace")) > 1
            data = self._held + piece
            text, used = codecs.utf_8_decode(data, "replace", False)
            self._held = data[used:]
            lost = self._held.decode(errors="replace")
            if len(lost) > 1:  # half a surrogate pair: Python waits for its end, though UTF-8 can't hold one
                text, self._held = text + lost, b""
        self.begins.append(begin)
        self.length += len(text)
        return text


class StopFinder:
    """Finds the first stop string in a text that comes in pieces, and shows nothing that one may still take back.

    The first is the one that a look after every character would find: that which ends first, and of several that
    end together the longest. This doesn't depend on how the text is cut. No stop string never stops.

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
        self.found: int | None = None  # the offset at which the text ends: that of the stop string's first character

    def push(self, text: str) -> str:
        """What may be shown now; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, stop = min(ends, key=lambda each: each[0])  # of equals the first, and the longest stand first
            self.found = self._shown + end - len(stop)
            keep = end - len(stop)
            self._held = ""
        else:
            self._held = next((each for each in self._beginnings if text.endswith(each)), "")
            keep = len(text) - len(self._held)
        self._shown += keep
        return text[:keep]

    def close(self) -> str:
        """The rest, at the end of a text that holds no stop string."""
        held, self._held = self._held, ""
        self._shown += len(held)
        return held


class Transcript:
    """One answer as it is written: tokens in, text out, up to the first stop string.

    After `push`, where `stopped`, the answer's tokens are its first `kept`; else, when it ends, `close` gives the rest.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Iterable[str] = ()) -> None:
        self._stream = TextStream(vocabulary)
        self._finder = StopFinder(stops)

    @property
    def stopped(self) -> bool:
        """A stop string was found; what is pushed from here on is not in the text."""
        return self._finder.found is not None

    @property
    def begins(self) -> Sequence[int]:
        """For each pushed token, the offset in the text at which it begins."""
        return self._stream.begins

    @property
    def kept(self) -> int:
        """How many of the pushed tokens belong to the text: all, or those that begin before the stop string.

        A stop string over several steps makes it fall below what was kept after an earlier one.
        """
        begins, found = self._stream.begins, self._finder.found
        return len(begins) if found is None else bisect_left(begins, found)

    def push(self, token: int) -> str:
        """What may be shown now that this token is in the text."""
        return "" if self.stopped else self._finder.push(self._stream.push(token))

    def close(self) -> str:
        """The text that was held back, when the answer ends otherwise; an incomplete last character is dropped."""
        return self._finder.close()
