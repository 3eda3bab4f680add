"""Online search for the sub-layers to skip, evaluated on the sequence being decoded (SWIFT, 2410.06916).

Takes sessions as they advance; gives the best set found so far. A try measures agreement: how many of the last tokens
the model without these sub-layers would have chosen too. Tries take at most `SHARE` of the decoding time, and end
when no better set is found; the output never depends on them.

The search begins with nested sets of the sub-layers that change the hidden state least, and goes on by mutating the
best set around the edge of that order. The best of many short, noisy tries is overrated: so a rival is tried again
beside the best set, on later tokens, before it replaces it. Which sets are tried depends on the number of tries and
their results, not on a random seed.
"""

from __future__ import annotations

from random import Random
from time import perf_counter

from longspec.cache.stage import Cache
from longspec.drafters.common.skip_speedup import Prices, agreement, gain, influence, nested, swapped, united
from longspec.model.decoder import Decoder, Skip
from longspec.types import Writing

__all__ = ["Search"]

SHARE = 0.015
"""Largest share of the decoding time that tries take."""

WINDOW = 32
"""The sequence's last tokens that a set is tried on."""

_SIZES = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65)  # of the first sets, as shares of all units
_CONFIRMED = 3  # windows that a set must be tried on before it becomes the best
_BETTER = 1.01  # least ratio of a rival's expected speed-up to the best set's
_PATIENCE = 32  # judgements without a better set, after which the search rests
_OLD = 8 * WINDOW  # number of tried tokens from which on a set's earlier results are halved
_RATE = 1 / 64  # update rate per draft of the share of drafts whose first token is kept
_FALL = 0.2  # drop of that share that restarts the search: 3 standard deviations at a share of 1/2


class Search:
    """Search state. best: the best set so far, `start` at first. tries: number of tries made."""

    def __init__(self, decoder: Decoder, start: Skip) -> None:
        self.best = start
        self.tries = 0
        self._decoder = decoder
        self._prices = Prices.by_bytes(decoder, WINDOW)
        self._order: list[Skip] = []  # units in the order in which to skip them
        self._next: list[Skip] = []  # sets to be tried
        self._seen: dict[Skip, tuple[int, int]] = {}  # tokens that agreed, and tokens tried
        self._idle = 0  # judgements without a better set
        self._credit = self._cost = 0.0  # seconds: time budget for tries, and recent maximum of a try's time
        self._last: float | None = None  # when a step ended
        self._kept, self._drafts = 0.0, 0  # share of drafts whose first token was kept, and their number
        self._level: float | None = None  # that share after the search came to rest

    @property
    def is_resting(self) -> bool:
        """True when `_PATIENCE` judgements found no better set: no more tries until acceptance falls."""
        return self._idle >= _PATIENCE

    def step(self) -> None:
        """Credit `SHARE` of the time since the last step to tries. The credit is capped: idle time adds little."""
        now = perf_counter()
        if self._last is not None:
            seconds = now - self._last
            if not self.tries:
                self._cost = max(self._cost, 2 * seconds)  # an estimate until the first try
            self._credit = min(self._credit + SHARE * seconds, 2 * self._cost)
        self._last = now

    def told(self, kept: bool) -> None:
        """Record whether the first token of a draft was kept; restart the search if that share has dropped."""
        if not self.is_resting:
            return
        self._drafts += 1
        self._kept += (kept - self._kept) * max(_RATE, 1 / self._drafts)
        if self._level is None:
            self._level = self._kept if self._drafts >= 2 / _RATE else None
        elif self._kept < self._level - _FALL:
            self._begin_anew()

    def turn(self, session: Writing, written: int) -> None:
        """Make a try if the time budget allows it. written: number of tokens generated so far."""
        cache = session.cache
        if self.is_resting or self._credit < self._cost or written < WINDOW:
            return
        if not cache.can_cut_anywhere:
            return
        began = perf_counter()
        self._try(session, cache)
        took = perf_counter() - began
        self._cost = took if not self.tries else max(took, 0.9 * self._cost)
        self._credit -= took
        self.tries += 1
        self._last = perf_counter()

    def _try(self, session: Writing, cache: Cache) -> None:
        if not self._order:
            self._prices = Prices.by_bytes(self._decoder, cache.length)
            moved = influence(self._decoder, cache, session.tokens, WINDOW, long=session.long)
            self._order = nested(self._prices, moved)
            sizes = [max(1, round(size * len(self._order))) for size in _SIZES]
            firsts = [self.best, *(united(self._order[:size]) for size in sizes)]
            self._next = list(dict.fromkeys(firsts))
            return
        skip = self._next.pop(0) if self._next else self._changed()
        agreed = agreement(self._decoder, cache, session.tokens, WINDOW, skip, long=session.long)
        before, rows = self._seen.get(skip, (0, 0))
        if rows >= _OLD:
            before, rows = before // 2, rows // 2
        self._seen[skip] = before + agreed, rows + WINDOW
        if not self._next:
            self._judge()

    def _judge(self) -> None:
        """Compare the most promising set tried so far with the best one: retry both, replace, or count as idle."""
        rival = max(self._seen, key=self._worth)
        if self._worth(rival) <= _BETTER * self._worth(self.best):
            self._idle += 1
        elif self._seen[rival][1] < _CONFIRMED * WINDOW:
            self._next = [self.best, rival]
        else:
            self.best, self._idle = rival, 0

    def _worth(self, skip: Skip) -> float:
        agreed, rows = self._seen.get(skip, (0, 0))
        return gain((agreed + 1) / (rows + 2), self._prices.share(skip), self._prices.row)

    def _changed(self) -> Skip:
        """A set to try: the best one with 1 to 3 units swapped near the order's edge; in 1 of 8 cases a random one."""
        random = Random(self.tries)
        units, best = self._order, self.best
        edge = sum(unit.attention <= best.attention and unit.mlp <= best.mlp for unit in units)
        for _ in range(16):
            if random.random() < 1 / 8:
                size = random.choice(_SIZES)
                skip = united([unit for unit in units if random.random() < size])
            else:
                skip = best
                for _ in range(random.randint(1, 3)):
                    place = round(random.gauss(edge - 0.5, 1 + len(units) / 8))
                    skip = swapped(skip, units[min(max(place, 0), len(units) - 1)])
            if skip not in self._seen:
                break
        return skip

    def _begin_anew(self) -> None:
        self._order, self._next, self._seen = [], [], {}
        self._idle, self._kept, self._drafts, self._level = 0, 0.0, 0, None
