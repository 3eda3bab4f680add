"""The states of layers that keep no row for every position: gated delta rule, linear attention, short convolutions.

A position leaves ingredients, not a state: a key k, a written value u, a decay, and the input x of a convolution, a
hundredth of a state's bytes. With S the state at the start of a position's block of 64, and j the rows of that block
on the position's path,

    state after the position  =  exp(d) S + sum_j exp(d - d_j) k_j u_j^T

where d sums the logarithms of the decays since the block's start. So what a position reads depends on its own position
and path: staged rows of a tree are rows like any others, and a commit keeps rows. A full block is folded into the
state, which is made anew and never written to: forks share it.

Rows of an older block are gone. A text can be cut back within its newest block, to that block's start, the one before
it, and those that were marked; else it begins anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longspec.cache.layout import Branch, Layout
from longspec.cache.stage import BLOCK, Shape, StateSpec, Take
from longspec.cache.tree import Tree

__all__ = ["History", "StateStage", "States", "fold"]

KEPT_STATES = 4
"""States of a text at most: the newest block's, the one before it, and two that were marked."""


class Point(NamedTuple):
    """What the rows of a block read of the text before it."""

    states: list[Tensor | None]  # per layer [heads, key dim, value dim]
    tail: Tensor  # [layers, tail, 1, dim]: the last inputs of the convolution

    @property
    def nbytes(self) -> int:
        return self.tail.nbytes + sum(state.nbytes for state in self.states if state is not None)


class States:
    """The states and the newest rows of one text, in all layers that have a state."""

    def __init__(self, shape: Shape) -> None:
        assert shape.states is not None
        self.shape, self.spec = shape, shape.states
        self.length = 0
        self.start = 0  # of the block that the next position belongs to
        self.changes = 0  # commits and truncations: a stage opened before the last one is stale
        self._point = self._zero()
        self._points: dict[int, Point] = {}  # at the starts of earlier blocks
        self._marked: tuple[int, ...] = ()
        self.rows: dict[str, Tensor] = {}  # [layers, 64, heads, dim] of the block's rows so far

    @property
    def nbytes(self) -> int:
        points = (self._point, *self._points.values())
        return sum(rows.nbytes for rows in self.rows.values()) + sum(point.nbytes for point in points)

    @property
    def point(self) -> Point:
        return self._point

    def open(self) -> StateStage:
        return StateStage(self)

    def commit(self, stage: StateStage, rows: Sequence[int]) -> None:
        """Make these staged rows text; each must have been put in all layers."""
        stage.check_complete(rows)
        before, length = self.length, self.length + len(rows)
        start = length // BLOCK * BLOCK
        if start > self.start:
            path = _Path(self, stage, rows)
            earlier = {self.start: self._point, **self._points}
            if start - BLOCK > self.start:
                earlier[start - BLOCK] = path.point(start - BLOCK)
            self._point = path.point(start)
            self._points = {at: point for at, point in earlier.items() if at in (start - BLOCK, *self._marked)}
        if length > max(before, start):
            first = max(0, start - before)  # of the new rows: the first in the newest block
            self._fill(stage, rows[first:], before + first - start)
        self.length, self.start = length, start
        self.changes += 1

    def mark(self) -> None:
        """Keep what a text needs to be cut back to here, or to the block before: it will be continued again."""
        self._marked = (self.start - BLOCK, self.start)

    def reach(self, length: int) -> int:
        """The length that `truncate` would leave."""
        if self.start <= length <= self.length:
            return length
        return max((at for at in self._points if at <= length), default=0)

    def truncate(self, length: int) -> None:
        length = self.reach(length)
        if length < self.start or not length:
            self._point = self._points.get(length) or self._zero()
            self.start = length
        self._points = {at: point for at, point in self._points.items() if at < self.start}
        self.length = length
        self.changes += 1

    def fork(self, length: int) -> States:
        twin = States(self.shape)
        twin.length, twin.start, twin._point = self.length, self.start, self._point
        twin._points, twin._marked = dict(self._points), self._marked
        twin.rows = {name: rows.clone() for name, rows in self.rows.items()}
        twin.truncate(length)
        return twin

    @staticmethod
    def room(spec: StateSpec) -> int:
        """Bytes of a text's states and rows, with one more state while it is made."""
        return (KEPT_STATES + 1) * spec.state_bytes + BLOCK * spec.row_bytes

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The newest block's state, tail and rows; `load_state` takes them."""
        if self._point.states[0] is not None:
            yield "states", torch.stack([state for state in self._point.states if state is not None])
        yield "states.tail", self._point.tail
        for row in self.spec.rows:
            yield f"states.{row.name}", self._held(row.name)[:, : self.length - self.start]

    def load_state(self, length: int, take: Take) -> None:
        spec, device = self.spec, self.shape.device
        self.length, self.start = length, length // BLOCK * BLOCK
        states: list[Tensor | None] = [None] * spec.layers
        if spec.state is not None:
            states = list(take("states", (spec.layers, *spec.state), torch.float32).to(device).unbind())
        tail = self._point.tail
        self._point = Point(states, take("states.tail", tuple(tail.shape), tail.dtype).to(device))
        held = length - self.start
        for row in spec.rows:
            rows = take(f"states.{row.name}", (spec.layers, held, row.heads, row.dim), row.dtype)
            self._held(row.name)[:, :held] = rows
        self.changes += 1

    def _held(self, name: str) -> Tensor:
        """The buffer [layers, 64, heads, dim] of the newest block's rows."""
        if name not in self.rows:
            for row in self.spec.rows:
                self.rows[row.name] = self.shape.empty((self.spec.layers, BLOCK, row.heads, row.dim), row.dtype)
        return self.rows[name]

    def _fill(self, stage: StateStage, rows: Sequence[int], at: int) -> None:
        for row in self.spec.rows:
            buffer = self._held(row.name)
            for layer in range(self.spec.layers):
                buffer[layer, at : at + len(rows)] = stage.rows(layer, row.name, rows)

    def _zero(self) -> Point:
        spec, device = self.spec, self.shape.device
        state = None if spec.state is None else torch.zeros(spec.state, device=device)
        (dim, dtype) = next(((row.dim, row.dtype) for row in spec.rows if row.name == "x"), (0, self.shape.dtype))
        return Point([state] * spec.layers, torch.zeros(spec.layers, spec.tail, 1, dim, dtype=dtype, device=device))


class StateStage:
    """The staged rows of the layers with a state."""

    def __init__(self, cache: States) -> None:
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
        """Bytes of a pass of so many rows: those of a long chain that stay, two states, and a layer's rows at work."""
        kept = min(rows, 2 * BLOCK + spec.tail)
        return kept * spec.row_bytes + 2 * spec.state_bytes + 2 * (rows + BLOCK) * spec.row_bytes // spec.layers

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
        if rows and min(rows) < first:
            raise ValueError(f"row {min(rows)} of a long chain is gone: at most a block of it can be left out")
        low = rows[0] - first if rows else 0
        if list(rows) == list(range(low + first, low + first + len(rows))):
            return held[low : low + len(rows)]
        return held[torch.tensor([row - first for row in rows], device=held.device)]

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


class _Path:
    """The rows of a text's newest block and those that are being committed, by their positions."""

    def __init__(self, cache: States, stage: StateStage, rows: Sequence[int]) -> None:
        self._cache, self._stage, self._rows = cache, stage, rows

    def point(self, at: int) -> Point:
        """What the block that starts at position `at` reads."""
        cache, layers = self._cache, range(self._cache.spec.layers)
        tails = []
        for layer in layers:
            text = cache.length - cache.start
            held = cache.rows["x"][layer, :text] if text else cache.point.tail[layer, :0]
            before = torch.cat((cache.point.tail[layer], held))  # up to the text's end
            new = at - cache.length
            own = self._stage.rows(layer, "x", self._rows[max(0, new - cache.spec.tail) : new])
            tails.append(torch.cat((before, own))[-cache.spec.tail :])
        return Point([self._state(layer, at) for layer in layers], torch.stack(tails))

    def _state(self, layer: int, at: int) -> Tensor | None:
        cache, stage = self._cache, self._stage
        if at == cache.start or cache.spec.state is None:
            return cache.point.states[layer]
        border = self._rows[at - 1 - cache.length]
        if (found := stage.state(layer, border)) is not None:
            return found
        before = self._state(layer, at - BLOCK)
        assert before is not None
        k, u, decay = (self._block(layer, name, at - BLOCK) for name in ("k", "u", "decay"))
        return fold(before, k, u, decay, cache.spec.key_of)

    def _block(self, layer: int, name: str, at: int) -> Tensor:
        """The 64 rows from position `at` on."""
        cache = self._cache
        first = at - cache.length
        own = self._stage.rows(layer, name, self._rows[max(0, first) : first + BLOCK])
        return own if first >= 0 else torch.cat((cache.rows[name][layer, :-first], own))


def fold(state: Tensor, k: Tensor, u: Tensor, decay: Tensor, key_of: Sequence[int]) -> Tensor:
    """The state after a block, from that before it [heads, key dim, value dim] and the block's 64 rows, each
    [64, heads, dim]. key_of: of each of the state's heads, the key's.
    """
    last = decay[-1:]
    if len(key_of) != k.shape[1]:
        k = k[:, torch.tensor(key_of, device=k.device)]
    weighted = (k * (last - decay).float().exp()).permute(1, 2, 0)  # [heads, key dim, 64]
    return torch.baddbmm(state * last[0, :, :, None].float().exp(), weighted, u.transpose(0, 1))
