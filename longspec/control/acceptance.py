"""What bets kept, recent ones counting most: what a limit promises, and how far a drafter's chances are right.

Takes verified drafts; knows no costs. A draft's first m nodes are a draft of their own, so that each one tells what all
limits up to its own would have kept: nothing is tried that is known already.

Letters: n nodes of a draft, m a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2
from typing import Any

__all__ = ["Record"]

_NEWER = 2 ** (1 / 16)  # a bet's weight, if that of the one before it is 1: an earlier one counts half after 16
_PRIOR = 1.0  # bets that the prior counts for
_FIRST = 0.5  # how probably a first node is kept, before anything was verified
_BINS = 8  # of chances, two to a halving: what is less probable than an eleventh is the last one's
_LEAST = 2 ** ((1 - _BINS) / 2)
_STORED = 8.0  # bets that a stored record counts for at most


class Record:
    """One drafter's bets: on one session, with the drafter's record on all of them as its prior, or on all.

    For each node's place in the draft: bets that reached so far, nodes that were verified there, and kept. Where bets
    didn't reach, a node follows the one before it as often as first nodes are kept, unless more is known (the geometric
    law of Leviathan et al., 2211.17192). For each bin of the drafter's chances: their sum, and the nodes kept. Instead
    of the old ones being made less, the new ones count more (`_weight`).
    """

    def __init__(self, most: int, prior: Record | None = None) -> None:
        self.prior = prior
        self._weight = 1.0  # of the newest bet
        self._bets, self._nodes, self._kept = ([0.0] * most for _ in range(3))
        self._chances, self._came = [0.0] * _BINS, [0.0] * _BINS
        self._could, self._went = 0.0, 0.0  # nodes that were kept and had another behind them, and it was kept too
        self.ranked = False  # drafts come with chances, and only nodes that are worth it are verified
        self._yields: tuple[list[float], list[float]] | None = None
        self._trusts: list[float] = []  # of the first bins

    def observe(
        self, limit: int, kept: Sequence[int], parents: Sequence[int], chances: Sequence[float] | None, cut: bool
    ) -> None:
        """A draft's first nodes were verified, each given by the one that it continues, -1 the text. cut: it had more,
        which weren't worth their rows.
        """
        nodes = len(parents)
        self._yields, self._trusts = None, []
        self._weight *= _NEWER
        if self._weight > 1e9:
            self._fade()
        weight = self._weight
        if nodes:
            self.ranked = chances is not None
        # Without chances a cut says nothing of the places behind it; with them it belongs to what the limit yields.
        for place in range(nodes if cut and chances is None else limit):
            self._bets[place] += weight
        for place in range(nodes):
            self._nodes[place] += weight
        for place in kept:
            self._kept[place] += weight
        if kept:
            self._went += weight * (len(kept) - 1)
            continued = set(parents)
            self._could += weight * sum(node in continued for node in kept)
        for place, chance in enumerate(chances or ()):
            at = _bin(chance)
            self._chances[at] += weight * chance
            if place in kept:
                self._came[at] += weight

    def doubt(self) -> None:
        """What is known counts for no more than one bet: the text has changed."""
        self._yields, self._trusts = None, []
        self._weight = max(self._weight, self._bets[0])

    def yields(self) -> tuple[list[float], list[float]]:
        """[most + 1]: how many nodes a limit is expected to keep, and to have verified."""
        if self._yields is None:
            prior = _PRIOR * self._weight
            kept, nodes = (_FIRST, 1.0) if self.prior is None else self.prior.first()
            going = self._going()
            further = going if self.ranked else 1.0
            keeps, rows, all_kept, all_nodes = [0.0], [0.0], 0.0, 0.0
            for bets, verified, came in zip(self._bets, self._nodes, self._kept, strict=True):
                kept = (came + prior * kept) / (bets + prior)
                nodes = (verified + prior * nodes) / (bets + prior)
                all_kept += kept
                all_nodes += nodes
                keeps.append(all_kept)
                rows.append(all_nodes)
                kept *= going
                nodes *= further
            self._yields = keeps, rows
        return self._yields

    def first(self) -> tuple[float, float]:
        """How probably a draft's first node is kept, and is there to be verified."""
        prior = _PRIOR * self._weight
        kept, nodes = (_FIRST, 1.0) if self.prior is None else self.prior.first()
        bets = self._bets[0] + prior
        return (self._kept[0] + prior * kept) / bets, (self._nodes[0] + prior * nodes) / bets

    def chance(self, chance: float) -> float:
        """How probably a node is kept that its drafter gives this chance."""
        return min(1.0, chance * self._trust(_bin(chance)))

    def places(self, nodes: int) -> list[float]:
        """How probably each node is kept of a draft without chances."""
        keeps, rows = self.yields()
        return [(keeps[i + 1] - keeps[i]) / max(rows[i + 1] - rows[i], 1e-9) for i in range(nodes)]

    def _going(self) -> float:
        """How probably the node behind a kept one is kept."""
        prior = _PRIOR * self._weight
        expected = self.first()[0] if self.prior is None else self.prior._going()
        return (self._went + prior * expected) / (self._could + prior)

    def _trust(self, place: int) -> float:
        """What a bin's chances are to be multiplied by: as the likelier bin's, unless more is known."""
        prior = 16 * _PRIOR * self._weight
        while len(self._trusts) <= place:
            at = len(self._trusts)
            before = self._trusts[-1] if at else None
            known = 1.0 if self.prior is None else self.prior._trust(at)
            if before is not None:
                known = before if self.prior is None else (before + known) / 2
            self._trusts.append((self._came[at] + prior * known) / (self._chances[at] + prior))
        return self._trusts[place]

    def _columns(self) -> tuple[list[float], ...]:
        return self._bets, self._nodes, self._kept, self._chances, self._came, [self._could, self._went]

    def _fill(self, columns: Sequence[list[float]]) -> None:
        self._bets, self._nodes, self._kept, self._chances, self._came, (self._could, self._went) = columns

    def _fade(self) -> None:
        self._fill([[count / self._weight for count in column] for column in self._columns()])
        self._weight = 1.0

    def report(self) -> dict[str, Any]:
        """What a later run may begin with."""
        weight = max(self._weight, self._bets[0] / _STORED)
        counts = [[round(count / weight, 3) for count in column] for column in self._columns()]
        return {"ranked": self.ranked, "counts": counts}

    @classmethod
    def of(cls, most: int, stored: object) -> Record:
        """A record over all sessions: a report, or an empty one where it isn't one."""
        made = cls(most)
        report = stored if isinstance(stored, Mapping) else {}
        counts = report.get("counts")
        if not isinstance(counts, list) or len(counts) != 6 or not all(isinstance(row, list) for row in counts):
            return made
        if not all(isinstance(count, int | float) and 0 <= count <= 1000 for row in counts for count in row):
            return made
        sizes = [most] * 3 + [_BINS] * 2 + [2]
        rows = zip(counts, sizes, strict=True)
        made._fill([[*map(float, row[:size]), *[0.0] * (size - len(row))] for row, size in rows])
        made.ranked = bool(report.get("ranked"))
        return made


def _bin(chance: float) -> int:
    return int(-2 * log2(chance)) if chance > _LEAST else _BINS - 1
