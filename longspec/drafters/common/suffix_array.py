"""Texts to draft from, searched by what stands before a place: a suffix array over their tokens.

Takes lists of tokens; gives trees of what followed the end of a text elsewhere. 12 bytes a token; a million tokens are
sorted in about a second, and a draft takes a tenth of a millisecond at any size. Suffixes are sorted by their first 16
tokens only: a longer context is no surer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import count

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_TOKENS", "Corpus"]

MOST_TOKENS = 1 << 21
"""A corpus is refused or cut at that size: 24 MiB, two seconds to sort."""

_SORTED = 16  # tokens
_CONTEXT = 12  # tokens that are looked for at most; the tree's paths are compared behind them
_LOOKED_AT = 64  # of the places where a context occurs


class Corpus:
    """Token lists; none is continued by the next."""

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self._tokens = np.empty(0, np.int32)
        self._keys = b""  # the same tokens, big-endian and one higher, so that bytes compare as they do
        self._order = np.empty(0, np.int32)
        self._coming: list[int] = []
        for text in texts:
            self.add(text)
        self._sort()

    def __len__(self) -> int:
        return len(self._tokens) + len(self._coming)

    def add(self, text: Sequence[int]) -> None:
        """It is found once enough has come together: sorting is paid for by growth of an eighth."""
        self._coming += [*text, -1]
        if len(self._coming) > max(256, len(self._tokens) // 8):
            self._sort()

    def bet(self, text: Sequence[int], limit: int, floor: float) -> tuple[list[int], list[int], list[float]]:
        """What followed the longest end of the text that occurs: at most `limit` tokens, their parents, the probs of
        their paths, the likeliest first. A token that followed c of n times, beside d - 1 others and after m tokens,
        has the chance c / (n + 2 d / m), as in `ngram`.
        """
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        leaves: list[tuple[float, int, int, int, list[int], int]] = []  # a heap; places behind the node, tokens to it
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
        """Places behind occurrences of the longest end of the text that occurs, some of very many; and its length.

        Where an end occurs, its own ends do: so the length is found by halving.
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
        """The suffixes that begin with it."""
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
        """By doubling: ranks by the first h tokens make those by the first 2 h."""
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
