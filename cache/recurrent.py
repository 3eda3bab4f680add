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

import torch
from torch import Tensor

from longspec.cache.folding import fold
from longspec.cache.shape import Shape, StateSpec
from longspec.cache.stage import BLOCK, Take
from longspec.cache.state_stage import Point, StateStage

__all__ = ["States"]

KEPT_STATES = 4
"""States of a text at most: the newest block's, the one before it, and two that were marked."""


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

    def tensors(self) -> Iterator[Tensor]:
        """The rows and states."""
        yield from self.rows.values()
        for point in (self._point, *self._points.values()):
            yield point.tail
            yield from (state for state in point.states if state is not None)

    def open(self) -> StateStage:
        return StateStage(self)

    def commit(self, stage: StateStage, rows: Sequence[int]) -> None:
        """Make these staged rows text; each must have been put in all layers."""
        self.check(stage, rows)
        before, length = self.length, self.length + len(rows)
        start = length // BLOCK * BLOCK
        if start > self.start:
            path = _Path(self, stage, rows)
            earlier = {self.start: self._point, **self._points}
            if start - BLOCK > self.start and path.reaches(start - BLOCK):
                earlier[start - BLOCK] = path.point(start - BLOCK)
            self._point = path.point(start)
            self._points = {at: point for at, point in earlier.items() if at in (start - BLOCK, *self._marked)}
        if length > max(before, start):
            first = max(0, start - before)  # of the new rows: the first in the newest block
            self._fill(stage, rows[first:], before + first - start)
        self.length, self.start = length, start
        self.changes += 1

    def check(self, stage: StateStage, rows: Sequence[int]) -> None:
        """Raise ValueError unless these staged rows can be made text."""
        stage.check_complete(rows)
        start = (self.length + len(rows)) // BLOCK * BLOCK
        stage.check_held(rows[max(0, start - self.length - self.spec.tail) :])

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
        """Bytes of a text's states and rows."""
        return KEPT_STATES * spec.state_bytes + BLOCK * spec.row_bytes

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


class _Path:
    """The rows of a text's newest block and those that are being committed, by their positions."""

    def __init__(self, cache: States, stage: StateStage, rows: Sequence[int]) -> None:
        self._cache, self._stage, self._rows = cache, stage, rows

    def reaches(self, at: int) -> bool:
        """Whether a long chain still holds what the block that starts at position `at` reads."""
        first = at - self._cache.length - self._cache.spec.tail
        return first < 0 or self._stage.holds(self._rows[first], self._rows[first + self._cache.spec.tail - 1])

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
