"""Where the rows of a pass find what they read in a stage of rows with states (`longspec.cache.recurrent`).

Takes the stage's tree; gives indices, made once for all layers of a pass. Knows no tensor of a layer.

A history is: rows of the text's newest block, the stage's earlier rows, and the pass's own. A branch is the rows of one
block that follow the same staged row: they read the state that the path to that row leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longspec.cache.shape import StateSpec
from longspec.cache.tree import Tree

__all__ = ["Branch", "Layout"]

Index = slice | Tensor
"""Rows of a history: a slice where they are neighbours."""


@dataclass(frozen=True)
class Branch:
    """Rows of one block, which read one state."""

    border: int  # the staged row before the block; -1 in the text's newest block
    known: Index  # of the history: this block's rows from earlier passes
    new: Index  # of the pass
    parents: tuple[int, ...]  # of known and new rows, within these; -1 is the block's start
    known_count: int
    earlier: int  # rows of the history before the pass's own

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Known and new rows in the history, their parents among these, and the new rows in the pass, each int64."""
        new = _numbers(self.new)
        return torch.cat((_numbers(self.known), new + self.earlier)), torch.tensor(self.parents), new

    @cached_property
    def mask(self) -> Tensor:
        """[new, known + new] bool: the row itself and its ancestors within the block."""
        size = len(self.parents)
        mask = torch.zeros(size, size, dtype=torch.bool)
        for row, parent in enumerate(self.parents):
            if parent >= 0:
                mask[row] = mask[parent]
            mask[row, row] = True
        return mask[self.known_count :]

    @cached_property
    def roots(self) -> Tensor:
        """[new]: each row's last ancestor among the known rows; -1 where none is."""
        roots = list(range(self.known_count))
        for parent in self.parents[self.known_count :]:
            roots.append(roots[parent] if parent >= 0 else -1)
        return torch.tensor(roots[self.known_count :])


@dataclass(frozen=True)
class Layout:
    """The history of a pass's rows of one stage."""

    first: int  # the first staged row of the history
    text: int  # rows of the text's newest block
    count: int  # rows of the pass
    stop: int  # of the stage: behind the last row
    branches: tuple[Branch, ...]
    window: Tensor | None  # [r, tail + 1]: of the tail and the history, inputs of each row's convolution; None: a chain
    _tree: Tree
    _borders: Sequence[int]

    @property
    def earlier(self) -> int:
        """Rows of the history before the pass's own."""
        return self.size - self.count

    @property
    def size(self) -> int:
        return self.text + self.stop - self.first

    @classmethod
    def of(cls, tree: Tree, borders: Sequence[int], rows: slice, first: int, text: int, spec: StateSpec) -> Layout:
        """Of the staged `rows`, where the stage holds rows from `first` on and the newest block `text` rows."""
        own: dict[int, list[int]] = {}
        for row in range(rows.start, rows.stop):
            own.setdefault(borders[row], []).append(row)
        branches, earlier = [], text + rows.start - first
        for border, new in own.items():
            known = [row for row in range(first, rows.start) if borders[row] == border]
            held = text if border < 0 else 0
            place = {row: held + i for i, row in enumerate([*known, *new])}
            parents = [*range(-1, held - 1)]
            for row in (*known, *new):
                parent = tree.parents[row]
                parents.append(-1 if parent == border and border >= 0 else held - 1 if parent < 0 else place[parent])
            indices = [*range(held), *(text + row - first for row in known)]
            at = _index([row - rows.start for row in new])
            branches.append(Branch(border, _index(indices), at, tuple(parents), len(indices), earlier))
        window = None if tree.is_chain else _window(tree, rows, first, text, spec.tail)
        return cls(first, text, rows.stop - rows.start, rows.stop, tuple(branches), window, tree, borders)

    def block_before(self, border: int) -> Index:
        """The 64 rows of the history up to the staged row `border`, along its path."""
        before, row, found = self._borders[border], border, []
        while row >= 0 and row != before:
            found.append(self.text + row - self.first)
            row = self._tree.parents[row]
        return _index([*(range(self.text) if before < 0 else ()), *reversed(found)])


def _window(tree: Tree, rows: slice, first: int, text: int, tail: int) -> Tensor:
    window = []
    for row in range(rows.start, rows.stop):
        back: list[int] = []
        while row >= 0 and len(back) <= tail:
            back.append(tail + text + row - first)
            row = tree.parents[row]
        back += range(tail + text - 1, tail + text - 1 - (tail + 1 - len(back)), -1)
        window.append(back[::-1])
    return torch.tensor(window)


def _index(rows: Sequence[int]) -> Index:
    if not rows:
        return slice(0, 0)
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows)


def _numbers(rows: Index) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
