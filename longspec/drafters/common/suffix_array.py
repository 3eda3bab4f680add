"""Suffix array over the tokens of texts to draft from.

Takes lists of tokens; gives trees of the tokens that followed occurrences of a sequence's end. It takes 12 bytes per
token, and a lookup is a binary search. Suffixes are sorted by their first 16 tokens only: a longer context hardly
changes the estimate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import count

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_TOKENS", "Corpus"]

MOST_TOKENS = 1 << 21
"""Capacity of a corpus: 24 MiB. More tokens in files are refused; otherwise the oldest are dropped."""

_SORTED = 16  # tokens of a suffix that are compared
_CONTEXT = 12  # longest context that is searched for, in tokens
_LOOKED_AT = 64  # about as many occurrences of a context are counted, evenly sampled


class Corpus:
    """Token lists, separated by -1: no draft runs from one into the next."""

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self._tokens = np.empty(0, np.int32)
        self._keys = b""  # token + 1 as big-endian uint32, so that bytes compare as tokens do
        self._order = np.empty(0, np.int32)  # the suffix array
        self._coming: list[int] = []  # tokens that aren't sorted in yet
        for text in texts:
            self.add(text)
        self._sort()

    def __len__(self) -> int:
        return len(self._tokens) + len(self._coming)

    def add(self, text: Sequence[int]) -> None:
        """Append a text. It can be found after the next sort: when the corpus has grown by an eighth, or 256 tokens."""
        self._coming += [*text, -1]
        if len(self._coming) > max(256, len(self._tokens) // 8):
            self._sort()

    def bet(self, text: Sequence[int], limit: int, floor: float) -> tuple[list[int], list[int], list[float]]:
        """Continuations of the longest suffix of `text` that occurs in the corpus: at most `limit` tokens, their
        parents and path probabilities, most probable first. A token that followed a context of m tokens in c of n
        occurrences, among d different followers, has probability c / (n + 2d / m), as in `ngram`.
        """
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        # A heap: -path probability, order, token, parent, corpus positions after the node, context length.
        leaves: list[tuple[float, int, int, int, list[int], int]] = []
        order = count()
        places, matched = self._find(text)
        chance, node = 1.0, -1
        while len(tokens) < limit:
            if matched:
                followers: dict[int, list[int]] = {}
                for place, token in zip(places, self._tokens[places].tolist(), strict=True):
                    followers.setdefault(token, []).append(place + 1)
                total = len(places) + 2 * len(followers) / matched
                for token, further in followers.items():
                    if token >= 0 and (path := chance * len(further) / total) >= floor:  # -1 ends a text
                        heappush(leaves, (-path, next(order), token, node, further, matched + 1))
            if not leaves:
                break
            loss, _, token, parent, places, matched = heappop(leaves)
            chance, node = -loss, len(tokens)
            tokens.append(token)
            parents.append(parent)
            probs.append(chance)
        return tokens, parents, probs

    def _find(self, text: Sequence[int]) -> tuple[list[int], int]:
        """Positions after (a sample of) the occurrences of the longest suffix that occurs; and its length.

        If a suffix occurs, so do its shorter ones: the length is found by binary search.
        """
        end = _bytes(np.asarray(text[-_CONTEXT:], np.int32))
        low, high = 0, len(end) // 4
        found = (0, 0)
        while low < high:
            middle = (low + high + 1) // 2
            first, last = self._range(end[len(end) - 4 * middle :])
            if first < last:
                low, found = middle, (first, last)
            else:
                high = middle - 1
        first, last = found
        step = -(-(last - first) // _LOOKED_AT) or 1
        return sorted(place + low for place in self._order[first:last:step].tolist()), low

    def _range(self, key: bytes) -> tuple[int, int]:
        """Range in the suffix array of the suffixes that begin with `key`."""
        keys, order, size = self._keys, self._order, len(key)

        def bound(after: bool) -> int:
            low, high = 0, len(order)
            while low < high:
                middle = (low + high) // 2
                at = 4 * int(order[middle])
                here = keys[at : at + size]
                if here < key or (after and here == key):
                    low = middle + 1
                else:
                    high = middle
            return low

        return bound(after=False), bound(after=True)

    def _sort(self) -> None:
        """Sort by prefix doubling: ranks by the first h tokens give those by the first 2h."""
        self._tokens = tokens = np.concatenate([self._tokens, np.asarray(self._coming, np.int32)])[-MOST_TOKENS:]
        self._coming = []
        self._keys = _bytes(tokens)
        ranks, h = tokens.astype(np.int64) + 1, 1
        while h < _SORTED:
            behind = np.zeros_like(ranks)
            behind[: max(0, len(ranks) - h)] = ranks[h:]
            both = ranks * (int(ranks.max(initial=0)) + 1) + behind
            ranks = np.unique(both, return_inverse=True)[1].astype(np.int64) + 1
            h *= 2
        self._order = np.argsort(ranks, kind="stable").astype(np.int32)


def _bytes(tokens: NDArray[np.int32]) -> bytes:
    return (tokens.astype(np.int64) + 1).astype(">u4").tobytes()
