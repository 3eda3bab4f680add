"""How often drafted tokens are kept, and how far a drafter's own probabilities are right; recent drafts count most.

Takes verified drafts; knows no costs. A shrinkage estimator: what one text shows is shrunk toward what all texts show,
and that toward a prior. An earlier draft counts half after 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

__all__ = ["Acceptance"]

_FADE = 2 ** (-1 / 16)
_BINS = 8
"""Of probabilities, two to a halving; what is less probable than an eleventh is in the last one."""


class Acceptance:
    """One drafter's drafts: those of one text, with all texts' as `prior`, or those of all."""

    def __init__(self, prior: Acceptance | None = None) -> None:
        self.prior = prior
        self._tried = self._went = 0.0  # depths of drafts that the target reached, and kept
        self._said, self._came = [0.0] * _BINS, [0.0] * _BINS  # by bin: sum of probabilities, nodes kept
        self._trusts: list[float] | None = None
        self.has_probs: bool = prior is not None and prior.has_probs  # the drafter says how probable its nodes are

    def observe(self, kept: Sequence[int], parents: Sequence[int], probs: Sequence[float] | None) -> None:
        """A draft was verified. kept: its nodes that are text now, a path. parents: of each node, -1 the text.
        probs: how probably each is kept, as the drafter sees it.
        """
        self._tried, self._went = _FADE * self._tried, _FADE * self._went
        self._said = [_FADE * value for value in self._said]
        self._came = [_FADE * value for value in self._came]
        self.has_probs |= probs is not None
        last = kept[-1] if kept else -1
        self._went += len(kept)
        self._tried += len(kept) + (last in parents)  # the path ended at a node that the draft went on from
        for node, prob in enumerate(probs or ()):
            self._said[_bin(prob)] += prob
            self._came[_bin(prob)] += node in kept
        self._trusts = None

    def doubt(self) -> None:
        """Let what is known count for one draft: the text has changed."""
        weight = 1 / max(1.0, self._tried)
        self._tried, self._went = weight * self._tried, weight * self._went
        self._said, self._came = [weight * x for x in self._said], [weight * x for x in self._came]
        self._trusts = None

    @property
    def rate(self) -> float:
        """How probably a draft's next depth is kept once the one before it is (the alpha of 2211.17192)."""
        expected = 0.5 if self.prior is None else self.prior.rate
        return (self._went + expected) / (self._tried + 1)

    def probability(self, said: float) -> float:
        """How probably a node is kept that its drafter gives this probability: times accepted over predicted."""
        return min(1.0, said * self._factors()[_bin(said)])

    def _factors(self) -> list[float]:
        """By bin; each is shrunk toward the next more probable bin's and the prior's, which count for 16 nodes."""
        if self._trusts is None or self.prior is not None:
            expected = [1.0] * _BINS if self.prior is None else self.prior._factors()
            factors: list[float] = []
            for known, said, came in zip(expected, self._said, self._came, strict=True):
                if factors:
                    known = factors[-1] if self.prior is None else (factors[-1] + known) / 2
                factors.append((came + 16 * known) / (said + 16))
            self._trusts = factors
        return self._trusts


def _bin(prob: float) -> int:
    return min(int(-2 * log2(prob)), _BINS - 1) if prob > 0 else _BINS - 1
