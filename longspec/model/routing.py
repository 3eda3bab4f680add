"""What a layer's router chose for the last rows: how many rows ago it chose each expert the last time.

Takes the choices of each pass; gives how many experts the last n rows chose together, their union, for every n at once:
those that were chosen fewer than n rows ago.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

__all__ = ["Recent", "unions"]

_NEVER = 1 << 40  # rows


class Recent:
    """One layer's experts. The rows of all texts of a pass are taken as they stand, one behind the other."""

    __slots__ = ("ages", "rows", "seen", "union")

    def __init__(self, experts: int) -> None:
        self.ages = np.full(experts, _NEVER)  # rows since an expert was chosen: 0 of the last row
        self.seen = 0  # rows so far
        self.rows = 0  # of the last pass
        self.union = 0  # experts that it went through

    def add(self, chosen: Tensor) -> None:
        """Take the experts [r, chosen] of a pass's rows."""
        rows, each = chosen.shape
        self.ages += rows
        # An expert that several rows chose is assigned several times, and keeps the last value: the latest row's.
        self.ages[chosen.flatten().numpy()] = np.repeat(np.arange(rows)[::-1], each)
        self.union = int(np.count_nonzero(self.ages < rows))
        self.rows = rows
        self.seen += rows


def unions(layers: Sequence[Recent], most: int) -> np.ndarray:
    """The experts that the last n rows chose together, on average over the layers: [most + 1], by n from 0."""
    ages = np.minimum(np.concatenate([layer.ages for layer in layers]), most)
    counts = np.bincount(ages, minlength=most + 1)[:most]
    return np.concatenate(([0.0], counts.cumsum() / len(layers)))
