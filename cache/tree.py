"""Topology of the staged rows: a tree, given by each row's parent.

Takes parents, gives depths, ancestor masks and paths; knows no token, key or model. A chain, by far the most common
tree, is recognised as it grows and needs no tree mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Tree"]


class Tree:
    """Tree of staged rows, growing pass by pass. Row i follows row `parents[i]`; -1 is the last committed position."""

    __slots__ = ("depths", "is_chain", "parents")

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.depths: list[int] = []  # 0 for rows right behind the committed ones
        self.is_chain = True

    def __len__(self) -> int:
        return len(self.parents)

    def add(self, parents: Sequence[int]) -> slice:
        """Append rows; returns their indices. Raises ValueError unless a parent precedes its child."""
        start = len(self.parents)
        for row, parent in enumerate(parents, start):
            if not -1 <= parent < row:
                raise ValueError(f"row {row} can't continue row {parent}: a parent stands before its child")
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
            self.is_chain = self.is_chain and parent == row - 1
        return slice(start, len(self.parents))

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all other rows. Raises ValueError unless they rise, and a row's parent stays with it."""
        places = {-1: -1} | {row: i for i, row in enumerate(rows)}
        orphans = [row for row in rows if self.parents[row] not in places]
        if list(rows) != sorted(places.keys() - {-1}) or orphans:
            raise ValueError(f"rows {list(rows)} can't stay alone: they must rise, each behind its parent")
        parents = [places[self.parents[row]] for row in rows]
        self.parents, self.depths, self.is_chain = [], [], True
        self.add(parents)

    def path(self, row: int) -> list[int]:
        """The row's ancestors and itself, root first."""
        path = []
        while row >= 0:
            path.append(row)
            row = self.parents[row]
        return path[::-1]

    def ancestors(self, rows: slice, window: int | None = None) -> Tensor:
        """[q, n] bool, the tree attention mask: True where row j < n = rows.stop is the row itself or an ancestor.

        With a window, only rows fewer than `window` positions back.
        """
        mask = torch.zeros(rows.stop - rows.start, rows.stop, dtype=torch.bool)
        for i in range(rows.start, rows.stop):
            path = self.path(i)
            mask[i - rows.start, path if window is None else path[-window:]] = True
        return mask

    def bits(self, rows: slice) -> list[int]:
        """The mask without a window as an integer for each row: bit j is set if it may read row j."""
        made: list[int] = []
        for row, parent in enumerate(self.parents[: rows.stop]):
            made.append((made[parent] if parent >= 0 else 0) | 1 << row)
        return made[rows]
