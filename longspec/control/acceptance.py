"""Acceptance statistics of a drafter, and the calibration of its probabilities; exponentially weighted.

Takes verified drafts; knows no costs. A shrinkage estimator: one sequence's rates are shrunk toward those of all
sequences, and these toward a prior. A draft's weight halves after 24 more.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

__all__ = ["Acceptance"]

_FADE = 2 ** (-1 / 24)
_BINS = 8
"""Of probabilities, two to a halving; what is less probable than an eleventh is in the last one."""


class Acceptance:
    """One drafter's statistics: of one sequence, with those of all sequences as `prior`, or of all."""

    def __init__(self, prior: Acceptance | None = None) -> None:
        self.prior = prior
        self._tried = self._went = 0.0  # weighted counts: depths of drafts that the target reached, and depths kept
        self._said, self._came = [0.0] * _BINS, [0.0] * _BINS  # by bin: sum of predicted probabilities, nodes kept
        self._trusts: list[float] | None = None
        self.has_probs: bool = prior is not None and prior.has_probs  # whether the drafter gives probabilities

    def observe(self, kept: Sequence[int], parents: Sequence[int], probs: Sequence[float] | None) -> None:
        """Add a verified draft. kept: the nodes kept, a path. parents: of each node, -1 the root. probs: each node's
        predicted probability of being kept, if the drafter gives one.
        """
        self._tried, self._went = _FADE * self._tried, _FADE * self._went
        self._said = [_FADE * value for value in self._said]
        self._came = [_FADE * value for value in self._came]
        self.has_probs |= probs is not None
        last = kept[-1] if kept else -1
        self._went += len(kept)
        self._tried += len(kept) + (last in parents)  # one more was tried if the draft went on after the last kept node
        for node, prob in enumerate(probs or ()):
            self._said[_bin(prob)] += prob
            self._came[_bin(prob)] += node in kept
        self._trusts = None

    def doubt(self) -> None:
        """Reduce the statistics' weight to that of one draft, as the text's character has changed."""
        weight = 1 / max(1.0, self._tried)
        self._tried, self._went = weight * self._tried, weight * self._went
        self._said, self._came = [weight * x for x in self._said], [weight * x for x in self._came]
        self._trusts = None

    @property
    def rate(self) -> float:
        """The probability that the next depth of a draft is kept, given that the last one was (alpha in 2211.17192)."""
        expected = 0.5 if self.prior is None else self.prior.rate
        return (self._went + expected) / (self._tried + 1)

    def probabilities(self, said: Sequence[float]) -> list[float]:
        """Of each node the calibrated probability that it is kept: the drafter's times accepted over predicted."""
        factors = self._factors()
        return [min(1.0, prob * factors[_bin(prob)]) for prob in said]

    def _factors(self) -> list[float]:
        """The calibration factor (accepted over predicted) of each bin, shrunk toward the next more probable bin's
        and the prior's, which count for 16 nodes.
        """
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
