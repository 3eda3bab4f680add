"""What a pass reads: bytes of weights, by its rows, and of the cache.

Takes what a decoder's sub-layers say that a pass of some rows touches. The rows of a dense model share all of its
weights. Those of a mixture share what isn't an expert's, and read the union of their experts: how fast that grows is a
text's own, and is learned from what the routers chose for its last rows. At random, 8 rows that choose 8 of 128 experts
each go through 52; rows that follow each other choose alike, and go through fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longspec.cache.shape import Shape
from longspec.model.mixtures import Mixture
from longspec.model.routing import Recent, unions

if TYPE_CHECKING:
    from longspec.model.decoder import Decoder

__all__ = ["Growth", "Reads", "rows_read"]

_ALL = 1 << 20  # rows that go through all experts
_MOST = 64  # rows whose union is learned: as many as a draft may have
_RECENT = 1 / 16  # weight of a pass; of one that brings _MOST rows it is 1


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes of weights that a pass reads."""

    always: int  # whatever its rows choose
    expert: float = 0.0  # of one expert in each of the layers that have some
    mixture: Mixture | None = None

    @classmethod
    def of(cls, touched: Callable[[int], int], mixture: Mixture | None) -> Reads:
        """By what a decoder says that so many rows touch."""
        always = touched(0)
        return cls(always) if mixture is None else cls(always, (touched(_ALL) - always) / mixture.experts, mixture)

    def by_union(self, experts: float) -> float:
        """Of rows that go through so many experts of each layer."""
        return self.always + self.expert * experts

    def by_rows(self, rows: float) -> float:
        """Of rows that choose at random, which is the most that they are expected to read."""
        return self.by_union(0.0 if self.mixture is None else self.mixture.union(rows))


def rows_read(shape: Shape, tokens: int) -> int:
    """Bytes of the cache that a row behind so many others reads, in the model's dtype: the rows of its windows, and the
    states of layers that keep some.
    """
    each = shape.sizes or ((shape.key_heads, shape.head_dim),) * shape.layers
    rows = [tokens if window is None else min(tokens, window) for window in shape.windows]
    read = sum(2 * heads * dim * count for (heads, dim), count in zip(each, rows, strict=True)) * shape.dtype.itemsize
    return read + (0 if shape.states is None else shape.states.state_bytes)


class Growth:
    """What a pass is expected to read, in passes of one row: 1 for every pass of a dense model."""

    def __init__(self, decoder: Decoder) -> None:
        self.mixture = decoder.config.mixture
        self.layers: list[Recent] = []
        if self.mixture is not None:
            own = decoder.layers[: decoder.config.group]
            self.layers = [recent for each in own if (recent := getattr(each.mlp, "recent", None)) is not None]
            self._reads = Reads.of(decoder.touched, self.mixture)
            self._rows = np.arange(_MOST + 1)
            self._unions = np.array([self.mixture.union(rows) for rows in range(_MOST + 1)])  # expected, by rows

    def __call__(self, rows: float) -> float:
        """Of a pass of `rows` >= 1."""
        return 1.0 if self.mixture is None else self._relative(self.mixture, self.union(rows))

    def union(self, rows: float) -> float:
        """Experts of a layer that so many rows are expected to go through."""
        assert self.mixture is not None
        if rows > _MOST:
            return _beyond(self.mixture, float(self._unions[-1]), rows - _MOST)
        return float(np.interp(rows, self._rows, self._unions))

    def observe(self) -> float | None:
        """Learn from the pass that was just run; gives what it has read, in passes of one row. None where routers
        aren't asked.
        """
        if self.mixture is None:
            return 1.0
        if not self.layers or not self.layers[0].seen:
            return None
        seen = min(_MOST, self.layers[0].seen)
        now = unions(self.layers, _MOST)
        now[seen + 1 :] = [_beyond(self.mixture, now[seen], rows) for rows in range(1, _MOST - seen + 1)]
        self._unions += min(1.0, max(_RECENT, self.layers[0].rows / _MOST)) * (now - self._unions)
        return self._relative(self.mixture, sum(layer.union for layer in self.layers) / len(self.layers))

    def _relative(self, mixture: Mixture, experts: float) -> float:
        return self._reads.by_union(experts) / self._reads.by_union(mixture.chosen)


def _beyond(mixture: Mixture, union: float, rows: float) -> float:
    """The union of rows that go through `union` experts and of so many more that choose at random."""
    return union + (mixture.experts - union) * mixture.union(rows) / mixture.experts
