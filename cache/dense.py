"""The dense cache: all keys and values in the model's dtype. A row is the keys and values of one token position.

One buffer per layer, [2, K, capacity, D] for K key heads of dimension D: keys, then values. Head before position, so
that a head's keys are contiguous.

Staged rows are written right behind the committed ones, so that attention reads both as one segment. Committing a chain
only adds to `length`; a kept tree path is gathered in place. Only one stage at a time can be there: a second open stage
has buffers of its own.

Capacity grows by an eighth, in whole blocks, layer by layer: over the life of a sequence each row is copied about eight
times, at most an eighth of the memory is unused, and only one layer's buffer is held twice during growth.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longspec.cache.shape import Buffers
from longspec.cache.stage import BLOCK, Bounds, Cache, Room, Segment, Shape, Stage, Take
from longspec.cache.tree import Tree

__all__ = ["Dense", "DenseStage", "near_start"]

_SPLIT_ROWS = 64
"""From this many staged rows on (prefill chunks) the committed rows are a segment of their own, which needs no mask."""

_NEAR_UNIT = 16
"""Unit of capacity of a residual window, in rows: the window is short, and whole blocks would waste more of it."""

_SOON = 512
"""Rows that a growth adds at most on a CPU beyond an eighth: untouched room takes no memory there, and copying some."""


class Dense(Cache):
    """Keys and values of one session. See `longspec.cache.stage.Cache` for the verbs."""

    lossless = True
    in_one_piece = True
    can_become = ("int8", "int4")

    def __init__(self, shape: Shape, *, near: bool = False) -> None:
        self.shape = shape
        self.near = near  # a residual window: rows are read from `near_start` of the reading position on
        self.length = 0
        self._start = 0  # position of the own buffers' first row; earlier ones are shared, or dropped
        self._shared: list[tuple[Buffers, int]] = []  # (buffers, rows), by position
        self._lent = 0  # rows before this position are read by a fork and must not be overwritten
        self._capacity = 0
        self.buffers = Buffers(self._empty(0) for _ in shape.windows)
        self._behind: weakref.ref[DenseStage] | None = None  # the stage whose rows lie behind the committed ones
        self._changes = 0  # number of commits and truncations: a stage opened before the last one is stale

    @property
    def can_cut_anywhere(self) -> bool:  # type: ignore[override]
        return not self.near

    @property
    def start(self) -> int:
        """Position of the first row in the own buffers."""
        return self._start

    def tensors(self) -> Iterator[Tensor]:
        for buffers in (self.buffers, *(shared for shared, _ in self._shared)):
            yield from buffers

    def open(self) -> DenseStage:
        stage = DenseStage(self, behind=self._behind is None or self._behind() is None)
        if stage.behind:
            self._behind = weakref.ref(stage)
        return stage

    def commit(self, stage: DenseStage, rows: Sequence[int]) -> None:
        stage.check_complete(rows)
        if not (stage.behind and list(rows) == list(range(len(rows)))):
            chosen = [buffer[:, :, stage.offset :].index_select(2, _index(rows, buffer)) for buffer in stage.buffers]
            self.reserve(self.length + len(rows))
            at = self.length - self._start
            for buffer, new in zip(self.buffers, chosen, strict=True):
                buffer[:, :, at : at + len(rows)] = new
        self.length += len(rows)
        self._changed()

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"can't truncate {self.length} rows to {length}")
        if length < max(self._start, self._lent):  # forks read what would be overwritten: share it, use new buffers
            runs, self._shared, start = [*self._shared, (self.buffers, self.length - self._start)], [], 0
            for buffers, rows in runs:
                if start < length:
                    self._shared.append((buffers, min(rows, length - start)))
                start += rows
            self.buffers, self._capacity = Buffers(self._empty(0) for _ in self.buffers), 0
            self._start = self._lent = length
        self.length = length
        self._changed()

    def fork(self, length: int) -> Dense:
        if not 0 <= length <= self.length:
            raise ValueError(f"can't share {length} of {self.length} rows")
        twin = Dense(self.shape)
        # A copy of the list: `reserve` and `drop` replace its entries, and the fork keeps the tensors of this moment.
        twin._shared = [*self._shared, (Buffers(self.buffers), self.length - self._start)]
        twin.length = twin._start = self.length
        self._lent = max(self._lent, length)
        twin.truncate(length)
        return twin

    def room(self, rows: int) -> Room:
        """All layers' buffers, and one layer's a second time for growth."""
        held = -(-rows // BLOCK) * BLOCK * self.shape.row_bytes
        return Room(held + held // max(self.shape.layers, 1))

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """`rows.LAYER` [2, K, rows, D]; of a residual window the rows from `start` on."""
        for layer in range(self.shape.layers):
            yield f"rows.{layer}", self.rows(layer)

    def load_state(self, length: int, take: Take) -> None:
        s, start = self.shape, near_start(length) if self.near else 0
        held = length - start
        self.reserve(held)
        for layer, buffer in enumerate(self.buffers):
            buffer[:, :, :held] = take(f"rows.{layer}", (2, s.key_heads, held, s.head_dim), s.dtype)
        self.begin(start, length)

    def begin(self, start: int, length: int) -> None:
        """Declare that the buffers of this empty cache hold the rows of positions start..length."""
        self._start, self.length = start, length
        self._changed()

    def rows(self, layer: int) -> Tensor:
        """The committed rows [2, K, rows, D] of a layer: a view if they are in one buffer, else a copy."""
        runs = [buffers[layer][:, :, :rows] for buffers, rows in self._shared]
        own = self.buffers[layer][:, :, : self.length - self._start]
        return torch.cat([*runs, own], 2) if runs else own

    def drop(self, layer: int) -> None:
        """Free a layer's rows. The cache must not be used afterwards."""
        empty = self._empty(0)
        self._shared = [(Buffers((*run[:layer], empty, *run[layer + 1 :])), rows) for run, rows in self._shared]
        self.buffers[layer] = empty

    def forget(self, row: int) -> None:
        """Free a residual window's rows before position `row`, which are read as codes or from a store now."""
        gone, held = row - self._start, self.length - row
        old, self._capacity, self._start = self.buffers, 0, row
        self.buffers = Buffers(self._empty(0) for _ in old)
        self.reserve(self.length)
        for buffer, was in zip(self.buffers, old, strict=True):
            buffer[:, :, :held] = was[:, :, gone : gone + held]

    def copy(self, length: int) -> Dense:
        """A copy of a residual window, truncated to `length`."""
        twin = Dense(self.shape, near=self.near)
        twin._start = self._start
        twin.reserve(length)
        for buffer, ours in zip(twin.buffers, self.buffers, strict=True):
            buffer[:, :, : length - self._start] = ours[:, :, : length - self._start]
        twin.length = length
        return twin

    def reserve(self, rows: int) -> None:
        """Grow the buffers to hold positions up to `rows`."""
        needed = rows - self._start
        if needed <= self._capacity:
            return
        more = max(self._capacity // 8, min(self._capacity, _SOON) if self.shape.device.type == "cpu" else 0)
        grown = max(needed, 0 if self.near else self._capacity + more)
        unit = _NEAR_UNIT if self.near else BLOCK
        self._capacity = -(-grown // unit) * unit
        for layer, old in enumerate(self.buffers):
            new = self._empty(self._capacity)
            new[:, :, : old.shape[2]] = old
            self.buffers[layer] = new

    def _changed(self) -> None:
        self._behind = None
        self._changes += 1

    def _empty(self, rows: int) -> Tensor:
        return self.shape.empty((2, self.shape.key_heads, rows, self.shape.head_dim), self.shape.dtype)


class DenseStage(Stage):
    """Stage of a dense cache. behind: its rows are in the cache's own buffers, right behind the committed ones."""

    by_layer = False

    def __init__(self, cache: Dense, behind: bool) -> None:
        self.behind = behind
        self._cache = cache
        self.length = cache.length  # committed positions before the stage
        self._opened = cache._changes
        self._tree = Tree()
        self._held = [0] * cache.shape.layers  # rows put so far, per layer
        self._reaches: dict[tuple[int, int, int, int | None, bool], tuple[int, Bounds | None]] = {}
        self._own = Buffers(() if behind else (cache._empty(0) for _ in cache.buffers))

    @property
    def depths(self) -> Sequence[int]:
        return self._tree.depths

    @property
    def layers(self) -> int:
        return self._cache.shape.layers

    @property
    def is_chain(self) -> bool:
        return self._tree.is_chain

    @property
    def buffers(self) -> Buffers:
        return self._cache.buffers if self.behind else self._own

    def reads(self, rows: slice) -> list[int]:
        """For each row a bit mask of the staged rows that it attends to."""
        return self._tree.bits(rows)

    @property
    def offset(self) -> int:
        return self.length - self._cache._start if self.behind else 0

    def add(self, parents: Sequence[int]) -> slice:
        self._check_fresh()
        rows = self._tree.add(parents)
        if self.behind:
            self._cache.reserve(self.length + rows.stop)
        else:
            self._own = Buffers(torch.cat((old, self._cache._empty(len(parents))), 2) for old in self._own)
        return rows

    def put(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        buffer = self.buffers[layer]
        at = slice(self.offset + rows.start, self.offset + rows.stop)
        buffer[0, :, at] = keys.transpose(0, 1)
        buffer[1, :, at] = values.transpose(0, 1)
        self.filled((layer,), rows)

    def keep(self, rows: Sequence[int]) -> None:
        self._check_fresh()
        self._tree.keep(rows)
        self._reaches.clear()
        for layer, buffer in enumerate(self.buffers):
            held = self._held[layer] = bisect_left(rows, self._held[layer])
            if held and rows[held - 1] >= held:  # else they stay where they are
                own = buffer[:, :, self.offset :]
                own[:, :, :held] = own.index_select(2, _index(rows[:held], buffer))

    def is_known(self, rows: slice) -> bool:
        return True

    def filled(self, layers: Sequence[int], rows: slice) -> None:
        for layer in layers:
            self._held[layer] = max(self._held[layer], rows.stop)

    def parts(self, layer: int, rows: slice, queries: Tensor) -> Iterator[Segment]:
        return (run.at(layer) for run in self.runs(layer, rows))

    def runs(self, layer: int, rows: slice) -> list[Segment]:
        window = self._cache.shape.windows[layer]
        self._check_fresh()
        cache, length, runs = self._cache, self.length, list[Segment]()
        start = 0  # position of a buffer's first row
        for buffers, count in cache._shared:
            runs.append(self._run(buffers, rows, start, start + count, window))
            start += count
        if self.behind and rows.stop - rows.start < _SPLIT_ROWS:
            runs.append(self._run(self.buffers, rows, cache.start, length, window, staged=True))
        else:
            runs.append(self._run(cache.buffers, rows, cache.start, length, window))
            runs.append(self._run(self.buffers, rows, length, length, window, offset=self.offset, staged=True))
        return [run for run in runs if run.columns]

    def check_complete(self, rows: Sequence[int]) -> None:
        """Raise ValueError unless the stage is fresh and these rows hold keys and values in all layers."""
        self._check_fresh()
        if rows and max(rows) >= min(self._held, default=len(self._tree)):
            raise ValueError(f"row {max(rows)} was put in some layers only: {self._held}")

    def _check_fresh(self) -> None:
        if self._opened != self._cache._changes:
            raise ValueError("this stage is stale: its cache has gone on since it was opened")

    def _run(
        self,
        buffers: Buffers,
        rows: slice,
        start: int,
        end: int,
        window: int | None,
        *,
        offset: int = 0,
        staged: bool = False,
    ) -> Segment:
        """Segment of the rows at positions start..end, from column `offset` on; with `staged` also the staged ones."""
        columns = end - start + (rows.stop if staged else 0)
        low, bounds = self._reach(rows, start, end, window, staged)
        return Segment(buffers, offset + low, columns - low, bounds, start + low)

    def _reach(self, rows: slice, start: int, end: int, window: int | None, staged: bool) -> tuple[int, Bounds | None]:
        """The first column that any of `rows` reads, and each row's bounds relative to it; cached over the layers."""
        key = (rows.start, rows.stop, start, window, staged)
        if key not in self._reaches:
            self._reaches[key] = self._measure(rows, start, end, window, staged)
        return self._reaches[key]

    def _measure(
        self, rows: slice, start: int, end: int, window: int | None, staged: bool
    ) -> tuple[int, Bounds | None]:
        chain = self._tree.is_chain
        columns = end - start + (rows.stop if staged else 0)
        if chain and rows.stop - rows.start == 1:  # plain decoding: one row reads all columns from `first` on
            position = self.length + self.depths[rows.start]
            first = 0 if window is None else position - window + 1
            if self._cache.near:
                first = max(first, near_start(position))
            return min(max(0, first - start), columns), None
        positions = torch.tensor([self.length + depth for depth in self.depths[rows]])
        first = torch.zeros_like(positions) if window is None else positions - window + 1
        if self._cache.near:
            first = torch.maximum(first, (positions // BLOCK - 1) * BLOCK)
        first = (first - start).clamp_(0, columns)
        low = int(first.min())
        if staged and not chain:
            low = min(low, end - start)  # the tree's mask needs all staged columns
        if not staged and bool((first == low).all()):
            return low, None  # all columns from `low` on
        device = self._cache.shape.device
        last = positions + 1 - start if chain and staged else torch.full_like(positions, columns)
        tail = parents = None
        if staged and not chain:
            tail = self._tree.ancestors(rows, window).to(device)
            parents = torch.tensor(self._tree.parents[: rows.stop])
        causal = chain and staged and columns == len(positions) and not bool(first.any())
        return low, Bounds((first - low).to(device), (last - low).to(device), tail, causal, parents)


def near_start(position: int) -> int:
    """First position of the residual window for the row at `position`: the start of the block before its own."""
    return max(0, position // BLOCK - 1) * BLOCK


def _index(rows: Sequence[int], buffer: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=buffer.device)
