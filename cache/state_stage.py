"""Staged rows of layers that keep a state (`longspec.cache.recurrent`), and what a pass's rows read of them.

Takes the newest block of a text; gives each layer its history: that block's rows, the stage's earlier ones, and room
for the pass's own. Of a long chain (a prefill chunk) the rows of its last two blocks stay, and the states before these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longspec.cache.folding import fold
from longspec.cache.layout import Branch, Layout
from longspec.cache.shape import Shape, StateSpec
from longspec.cache.stage import BLOCK
from longspec.cache.tree import Tree

__all__ = ["History", "Point", "StateStage"]


class Point(NamedTuple):
    """What the rows of a block read of the text before it."""

    states: list[Tensor | None]  # per layer [heads, key dim, value dim]
    tail: Tensor  # [layers, tail, 1, dim]: the last inputs of the convolution

    @property
    def nbytes(self) -> int:
        return self.tail.nbytes + sum(state.nbytes for state in self.states if state is not None)


class Text(Protocol):
    """The committed part of a text."""

    length: int
    start: int  # of the newest block
    changes: int

    @property
    def shape(self) -> Shape: ...
    @property
    def spec(self) -> StateSpec: ...
    @property
    def rows(self) -> Mapping[str, Tensor]: ...  # [layers, 64, heads, dim] of the newest block
    @property
    def point(self) -> Point: ...


class StateStage:
    """The staged rows of the layers with a state."""

    def __init__(self, cache: Text) -> None:
        self.cache = cache
        self.length, self.start = cache.length, cache.start
        self._opened = cache.changes
        self._tree = Tree()
        self._borders: list[int] = []  # per row: the staged row before its block, -1 in the text's newest block
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._held: list[dict[str, Tensor]] = [{} for _ in range(cache.spec.layers)]  # rows from `_first` on
        self._first = [0] * cache.spec.layers
        self._stop = [0] * cache.spec.layers
        self._states: list[dict[int, Tensor]] = [{} for _ in range(cache.spec.layers)]  # by the row before the block

    @staticmethod
    def room(spec: StateSpec, rows: int) -> int:
        """Bytes of a pass of so many rows: those of a long chain that stay, two states and the one that a commit makes,
        and a layer's rows at work.
        """
        kept = min(rows, 2 * BLOCK + spec.tail)
        return kept * spec.row_bytes + 3 * spec.state_bytes + 2 * (rows + BLOCK) * spec.row_bytes // spec.layers

    def add(self, parents: Sequence[int]) -> slice:
        rows = self._tree.add(parents)
        for row in range(rows.start, rows.stop):
            position, parent = self.length + self._tree.depths[row], self._tree.parents[row]
            if position // BLOCK == self.start // BLOCK:
                self._borders.append(-1)
            else:
                self._borders.append(parent if position % BLOCK == 0 else self._borders[parent])
        return rows

    def history(self, layer: int, rows: slice, **new: Tensor) -> History:
        """What `rows` read at a layer, with room for what they leave; `new` is what is known of that already, by name,
        each [r, heads, dim].
        """
        self._check_fresh()
        cache, first = self.cache, min(self._first[layer], rows.start)
        key = (rows.start, rows.stop)
        if key not in self._layouts:
            self._layouts[key] = Layout.of(self._tree, self._borders, rows, first, self.length - self.start, cache.spec)
        layout, made = self._layouts[key], {}
        for row in cache.spec.rows:
            room = torch.empty(layout.size, row.heads, row.dim, dtype=row.dtype, device=cache.shape.device)
            if layout.text:
                room[: layout.text] = cache.rows[row.name][layer, : layout.text]
            if rows.start > first:
                room[layout.text : layout.earlier] = self._held[layer][row.name][: rows.start - first]
            if row.name in new:
                room[layout.earlier :] = new[row.name]
            made[row.name] = room
        return History(self, layer, layout, made)

    def put(self, history: History) -> None:
        """Keep what these rows leave. Of a long chain those stay that a commit of all but a block may still ask for."""
        layer, layout = history.layer, history.layout
        first = layout.first
        if self._tree.is_chain:
            oldest = (self.length + layout.stop - 1) // BLOCK * BLOCK - BLOCK  # start of the last row's block but one
            first = max(first, oldest - self.length - self.cache.spec.tail)
        gone = layout.text + first - layout.first
        self._held[layer] = {
            name: rows[gone:].clone() if first > layout.first else rows[gone:] for name, rows in history.rows.items()
        }
        if first > layout.first:
            kept = sorted(self._states[layer])[-2:]
            self._states[layer] = {border: self._states[layer][border] for border in kept}
        self._first[layer], self._stop[layer] = first, layout.stop

    def state(self, layer: int, border: int) -> Tensor | None:
        """The state of the block behind a staged row, if it was made; of the text's newest block for -1."""
        return self.cache.point.states[layer] if border < 0 else self._states[layer].get(border)

    def keep_state(self, layer: int, border: int, state: Tensor) -> None:
        self._states[layer][border] = state

    def rows(self, layer: int, name: str, rows: Sequence[int]) -> Tensor:
        """[n, heads, dim] of staged rows."""
        held, first = self._held[layer][name], self._first[layer]
        low = rows[0] - first if rows else 0
        if list(rows) == list(range(low + first, low + first + len(rows))):
            return held[low : low + len(rows)]
        return held[torch.tensor([row - first for row in rows], device=held.device)]

    def check_held(self, rows: Sequence[int]) -> None:
        """Raise ValueError where a row isn't there any more."""
        if rows and min(rows) < self._first[0]:
            raise ValueError(f"row {min(rows)} of a long chain is gone: at most a block of it can be left out")

    def holds(self, row: int, border: int) -> bool:
        """Whether rows from `row` on are there, and the state behind `border`."""
        has_state = self.cache.spec.state is None or self.state(0, border) is not None
        return row >= self._first[0] and has_state

    def check_complete(self, rows: Sequence[int]) -> None:
        """Raise ValueError unless the stage is fresh and these rows were put in all layers."""
        self._check_fresh()
        if rows and max(rows) >= min(self._stop):
            raise ValueError(f"row {max(rows)} was put in some layers only: {self._stop}")

    def _check_fresh(self) -> None:
        if self._opened != self.cache.changes:
            raise ValueError("this stage is stale: its cache has gone on since it was opened")


class History:
    """What the rows of a pass read at one layer: rows of the text's newest block, staged ones, and themselves."""

    def __init__(self, stage: StateStage, layer: int, layout: Layout, rows: dict[str, Tensor]) -> None:
        self.stage, self.layer, self.layout = stage, layer, layout
        self.rows = rows  # by name [n, heads, dim]; the last ones are the pass's own

    @property
    def branches(self) -> Sequence[Branch]:
        return self.layout.branches

    def add(self, name: str, rows: Tensor) -> None:
        """What the pass's rows [r, heads, dim] leave under a name."""
        self.rows[name][self.layout.earlier :] = rows

    def keep(self, branch: Branch, **rows: Tensor) -> None:
        """What a branch's rows leave, by name, each [n, heads, dim]."""
        for name, each in rows.items():
            self.rows[name][self.layout.earlier :][branch.new] = each

    def inputs(self) -> list[Tensor]:
        """The convolution's inputs of the pass's rows, the oldest first: `tail` + 1 tensors [r, dim]."""
        tail, layout = self.stage.cache.point.tail[self.layer], self.layout
        inputs = torch.cat((tail, self.rows["x"]))[:, 0]
        back = layout.window
        if back is None:  # a chain
            last = len(inputs) - layout.count
            return [inputs[last - i : last - i + layout.count] for i in range(len(tail), -1, -1)]
        back = back.to(inputs.device)
        return [inputs[back[:, i]] for i in range(len(tail) + 1)]

    def state(self, branch: Branch) -> Tensor:
        """The state [heads, key dim, value dim] that a branch's rows read."""
        return self._state(branch.border)

    def _state(self, border: int) -> Tensor:
        stage, found = self.stage, self.stage.state(self.layer, border)
        if found is not None:
            return found
        before = self._state(stage._borders[border])
        block = self.layout.block_before(border)
        k, u, decay = (self.rows[name][block] for name in ("k", "u", "decay"))
        state = fold(before, k, u, decay, stage.cache.spec.key_of)
        stage.keep_state(self.layer, border, state)
        return state
