"""A search for the sub-layers to leave out, on the fly: as a text is written, on the text itself (SWIFT, 2410.06916).

Takes sessions as they go on; gives the best set that is known by now. Now and then it tries one: how many of the last
tokens would a model without these sub-layers have written too? The tries take their share of the time and no more, and
end where they find nothing better; what is written never depends on them.

It begins with the sub-layers that move the hidden state least, as many as pay, and goes on by changing the best set
around the edge of that order. Of many short tries the luckiest looks best: so a better one is tried again beside the
best, on later text, before it takes its place. Which sets are tried depends on the number of tries alone.
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
"""Of the time that texts take, as much goes into tries at most."""

WINDOW = 32
"""Tokens of the text that a set is tried on."""

_SIZES = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65)  # of all that can be left out, in the first tries
_CONFIRMED = 3  # windows that a set is tried on before it becomes the best
_BETTER = 1.01  # what a set must promise of the best one's speed-up to take its place
_PATIENCE = 32  # tries without a better set, after which there are no more
_OLD = 8 * WINDOW  # tokens from which on a set's earlier ones count half
_RATE = 1 / 64  # how much a draft counts in the share of drafts whose first token is kept
_FALL = 0.2  # when that share has fallen by so much, the search begins anew: 3 standard deviations where it is a half


class Search:
    """The best set so far. start: what to begin with.

    tries: how many have been made.
    """

    def __init__(self, decoder: Decoder, start: Skip) -> None:
        self.best = start
        self.tries = 0
        self._decoder = decoder
        self._prices = Prices.by_bytes(decoder, WINDOW)
        self._order: list[Skip] = []  # units, the one to be left out first in front
        self._next: list[Skip] = []  # sets to be tried
        self._seen: dict[Skip, tuple[int, int]] = {}  # tokens that agreed, and all
        self._idle = 0
        self._credit = self._cost = 0.0  # seconds: that tries may take by now, and that the dearest took
        self._last: float | None = None  # when a step ended
        self._kept, self._drafts = 0.0, 0
        self._level: float | None = None  # the share of kept first tokens when the search ended

    @property
    def is_resting(self) -> bool:
        """Nothing better was found for long: no more tries, until drafts are kept less often."""
        return self._idle >= _PATIENCE

    def step(self) -> None:
        """A step of a text has ended: its time earns tries theirs. Time that nothing was written in earns little."""
        now = perf_counter()
        if self._last is not None:
            seconds = now - self._last
            if not self.tries:
                self._cost = max(self._cost, 2 * seconds)  # a guess, until one was made
            self._credit = min(self._credit + SHARE * seconds, 2 * self._cost)
        self._last = now

    def told(self, kept: bool) -> None:
        """The first token of a draft was kept, or not."""
        if not self.is_resting:
            return
        self._drafts += 1
        self._kept += (kept - self._kept) * max(_RATE, 1 / self._drafts)
        if self._level is None:
            self._level = self._kept if self._drafts >= 2 / _RATE else None
        elif self._kept < self._level - _FALL:
            self._begin_anew()

    def turn(self, session: Writing, written: int) -> None:
        """Make a try if its time has come. written: how many of the text's last tokens the target has written."""
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
        """Of all sets that were tried, see to the one that looks best."""
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
        """A set that wasn't tried: the best with a few units changed around the order's edge, or now and then any."""
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
