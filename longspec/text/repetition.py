"""Detection of endless repetition during generation, token by token.

Takes an answer's tokens one by one; knows no vocabulary and no model, so that the end of a sequence depends on its
tokens only. For each distance d up to `FAR` the detector counts for how many tokens each has equalled the one d tokens
before it: a loop of period p is a long run at distance p. A token costs one comparison per distance.

Legitimate repetition in programs and tables must not end a sequence. So a loop needs a number of whole repetitions and
a total number of tokens that rulers, rows of dashes and a handful of equal lines don't reach; for periods of a few
distinct tokens (a matrix of zeros, an empty table) the total is higher.
"""

from __future__ import annotations

import numpy as np

__all__ = ["Loops"]

FAR = 2048
"""Longest detected period, in tokens."""

REPEATS, FEWER, LONG = 4, 3, 128
"""Least number of repetitions of a period: `REPEATS`, or `FEWER` for periods of `LONG` tokens and more."""

LEAST = 200
"""Least length of all repetitions together, in tokens."""

PLAIN, LEAST_PLAIN = 8, 600
"""For a period of fewer than `PLAIN` distinct tokens, which may be a table's, that length is `LEAST_PLAIN`."""


class Loops:
    """Loop detector of one answer."""

    def __init__(self) -> None:
        self._seen = np.full(4 * FAR, -1, dtype=np.int32)  # the last tokens, right before `_end`
        self._end = FAR
        periods = np.arange(FAR, 0, -1, dtype=np.int32)
        repeats = np.where(periods < LONG, REPEATS, FEWER)
        self._wanted = np.maximum(LEAST, repeats * periods) - periods  # least run of a loop, by descending period
        self._runs = np.zeros(FAR, dtype=np.int32)

    def take(self, token: int) -> bool:
        """Add a token; True if the answer ends with a loop now."""
        if self._end == len(self._seen):
            self._seen[:FAR] = self._seen[-FAR:]
            self._end = FAR
        before = self._seen[self._end - FAR : self._end]  # by descending distance, as in `_runs`
        self._runs += 1
        self._runs *= before == token
        self._seen[self._end] = token
        self._end += 1
        long = self._runs >= self._wanted
        for place in np.flatnonzero(long)[::-1] if long.any() else ():
            period = FAR - int(place)
            plain = len(np.unique(self._seen[self._end - period : self._end])) < PLAIN
            if not plain or self._runs[place] + period >= LEAST_PLAIN:
                return True
        return False
