"""A text that only repeats itself: noticed while it is written, token by token.

Takes an answer's tokens one by one; knows no vocabulary and no model, so that where a text is ended depends on the
text alone. For each distance up to `FAR` the detector counts how long every token has equalled the one so far before
it: a loop of period p is a long run at distance p. A token costs one comparison per distance, some 11 microseconds.

What programs and tables repeat must not be taken for it. A loop is so many whole repetitions and, all together, so
many tokens: rulers, rows of dashes, and a handful of equal lines are shorter. What is made of a few different tokens
(a matrix of zeros, an empty table) may go on for longer.
"""

from __future__ import annotations

import numpy as np

__all__ = ["Loops"]

FAR = 2048
"""The longest period that is seen, in tokens."""

REPEATS, FEWER, LONG = 4, 3, 128
"""How often a period has to be there: a long one, from `LONG` tokens on, less often."""

LEAST = 200
"""Tokens of all repetitions together."""

PLAIN, LEAST_PLAIN = 8, 600
"""A period of fewer than `PLAIN` different tokens may be a table's: so many tokens then."""


class Loops:
    """What an answer's tokens so far repeat."""

    def __init__(self) -> None:
        self._seen = np.full(4 * FAR, -1, dtype=np.int32)  # the last tokens, right before `_end`
        self._end = FAR
        periods = np.arange(FAR, 0, -1, dtype=np.int32)
        repeats = np.where(periods < LONG, REPEATS, FEWER)
        self._wanted = np.maximum(LEAST, repeats * periods) - periods  # what a run has to be, by falling period
        self._runs = np.zeros(FAR, dtype=np.int32)

    def take(self, token: int) -> bool:
        """The answer has one more token: whether it ends with a loop now."""
        if self._end == len(self._seen):
            self._seen[:FAR] = self._seen[-FAR:]
            self._end = FAR
        before = self._seen[self._end - FAR : self._end]  # the farthest first, as in `_runs`
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
