"""The shape of staged rows: who continues whom.

Takes parents, gives depths, ancestors and paths; knows no token, key or model. A chain, by far the most common
tree, is recognised as it grows and never gets a mask of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Tree"]


class Tree:
    """Rows behind a text, growing pass by pass. Row i continues row `parents[i]`; -1 is the text itself."""

    __slots__ = ("depths", "is_chain", "parents")

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.depths: list[int] = []  # 0 for what follows the text directly
        self.is_chain = True

    def __len__(self) -> int:
        return len(self.parents)

    def add(self, parents: Sequence[int]) -> slice:
        """Append rows; their place among the rows. A parent must stand before its child, else ValueError."""
        start = len(self.parents)
        for row, parent in enumerate(parents, start):
            if not -1 <= parent < row:
                raise ValueError(f"row {row} can't continue row {parent}: a parent stands before its child")
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
            self.is_chain = self.is_chain and parent == row - 1
        return slice(start, len(self.parents))

    def path(self, row: int) -> list[int]:
        """The row's ancestors and itself, root first."""
        path = []
        while row >= 0:
            path.append(row)
            row = self.parents[row]
        return path[::-1]

    def ancestors(self, rows: slice, window: int | None = None) -> Tensor:
        """[q, n] bool: which rows 0 <= j < rows.stop each of `rows` may read: itself and its ancestors.

        With a window, only those fewer than `window` positions back.
        """
        mask = torch.zeros(rows.stop - rows.start, rows.stop, dtype=torch.bool)
        for i in range(rows.start, rows.stop):
            path = self.path(i)
            mask[i - rows.start, path if window is None else path[-window:]] = True
        return mask

    def bits(self, rows: slice) -> list[int]:
        """The same of each row without a window: bit j is set where it may read row j."""
        made: list[int] = []
        for row, parent in enumerate(self.parents[: rows.stop]):
            made.append((made[parent] if parent >= 0 else 0) | 1 << row)
        return made[rows]
