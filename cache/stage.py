"""What every cache speaks: parts to read, stages to write to, and the commit between them.

    cache.open() -> stage        rows of a pass that are not text yet
    stage.add(parents)           announces rows, returns their place
    stage.put(layer, rows, ...)  their keys and values at one layer
    stage.parts(layer, rows)     everything those rows may read at that layer, in readable pieces
    cache.commit(stage, rows)    these rows are text now; the rest never were

Letters: q rows that read, n columns of a part, K key heads, D head dimension.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "Bounds",
    "Cache",
    "Codec",
    "CodedPart",
    "CodedRun",
    "Part",
    "Room",
    "Run",
    "Shape",
    "Stage",
    "Take",
]

BLOCK = 64
"""Rows in a block: the one unit of growth, quantization, paging, offload, sharing and snapshots."""

PIECE_BLOCKS = 16
"""Coded blocks that are decoded at once: 1,024 rows stay in a core's L2, and cost one call of each operator."""

Take = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""Gives a tensor of a cache's state by its name, in the shape and dtype that it must have; it lies on the host."""

_MAPPED_NBYTES = 256 << 10
"""From here on a buffer is mapped: the page that its end wastes is then below one percent of it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a cache must know of the model that fills it."""

    key_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # per layer: how many positions back a row reads, itself included; None is all
    dtype: torch.dtype
    device: torch.device

    @property
    def layers(self) -> int:
        return len(self.windows)

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room on the device, of any values.

        On a CPU large room comes from the system and goes back to it at once. malloc keeps what is freed, and buffers
        that grow don't fit into what their smaller selves left: 3,000 dense rows held 110 MB more than their own 67.
        """
        nbytes = prod(size) * dtype.itemsize
        if self.device.type != "cpu" or nbytes < _MAPPED_NBYTES:
            return torch.empty(*size, dtype=dtype, device=self.device)
        return torch.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(*size)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's keys and values in all layers, in `dtype`."""
        return 2 * self.layers * self.key_heads * self.head_dim * self.dtype.itemsize


class Room(NamedTuple):
    """Bytes that a cache takes: on the device that computes, beside it in host memory, and on disk."""

    device: int
    host: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which columns of a part each row may read: `first <= column < last`, and of the last t only those in `tail`."""

    first: Tensor  # [q] int64
    last: Tensor  # [q] int64
    tail: Tensor | None = None  # [q, t] bool, a tree's ancestors
    causal: bool = False  # these bounds are the lower triangle of a square: row i reads columns 0..i
    parents: Tensor | None = None  # [t] int64, of the tail's columns, of which the last q are the rows themselves
    _biases: dict[tuple[int, torch.dtype, int], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def allowed(self, n: int) -> Tensor:
        """[q, n] bool."""
        columns = torch.arange(n, device=self.first.device)
        allowed = (columns >= self.first[:, None]) & (columns < self.last[:, None])
        if self.tail is not None:
            allowed[:, n - self.tail.shape[1] :] &= self.tail
        return allowed

    def within(self, start: int, stop: int, n: int) -> Bounds:
        """The same for columns start..stop of n alone."""
        first, last = (self.first - start).clamp(0, stop - start), (self.last - start).clamp(0, stop - start)
        if self.tail is None:
            return Bounds(first, last)
        before = n - self.tail.shape[1]  # columns that the tail says nothing of
        parents = self.parents if start <= before and stop == n else None  # only a whole tree is one
        return Bounds(first, last, self.tail[:, max(0, start - before) : max(0, stop - before)], parents=parents)

    def bias(self, n: int, dtype: torch.dtype, repeats: int = 1) -> Tensor:
        """[repeats * q, n]: 0 where a row may read, -inf where not.

        Made once and kept: all layers of a pass with the same window share one Bounds. `repeats` serves backends that
        lay the query heads of a group behind each other as rows.
        """
        key = (n, dtype, repeats)
        if key not in self._biases:
            bias = torch.zeros(len(self.first), n, dtype=dtype, device=self.first.device)
            bias.masked_fill_(~self.allowed(n), float("-inf"))
            self._biases[key] = bias.repeat(repeats, 1)
        return self._biases[key]


@dataclass(frozen=True, slots=True)
class Part:
    """One readable piece of a cache. Bounds of None: every row reads every column."""

    keys: Tensor  # [K, n, D]
    values: Tensor  # [K, n, D]
    bounds: Bounds | None = None
    start: int = 0  # the text's row in the first column; staged rows count on from the text's last

    @property
    def columns(self) -> int:
        return self.keys.shape[1]

    def cut(self, first: int, last: int) -> Part:
        """Columns first..last alone."""
        bounds = None if self.bounds is None else self.bounds.within(first, last, self.columns)
        return Part(self.keys[:, first:last], self.values[:, first:last], bounds, self.start + first)

    def pieces(self) -> Iterator[Part]:
        yield self


@dataclass(frozen=True, slots=True)
class Run:
    """Dense rows of a text that stand in the same place in every layer: a `Part` of each."""

    buffers: Sequence[Tensor]  # of each layer [2, K, capacity, D]: keys, then values
    column: int  # a head's rows from here on
    columns: int
    bounds: Bounds | None
    start: int

    def cut(self, first: int, last: int) -> Run:
        """Columns first..last alone."""
        bounds = None if self.bounds is None else self.bounds.within(first, last, self.columns)
        return Run(self.buffers, self.column + first, last - first, bounds, self.start + first)

    def part(self, layer: int) -> Part:
        keys, values = self.buffers[layer][:, :, self.column : self.column + self.columns]
        return Part(keys, values, self.bounds, self.start)


@dataclass(frozen=True, slots=True)
class CodedRun:
    """Coded blocks of a text that stand in the same place in every layer: a `CodedPart` of each."""

    codec: Codec
    codes: Sequence[tuple[Tensor, ...]]  # of each layer, each [K, capacity, ...]
    blocks: slice  # of these
    bounds: Bounds | None  # over their columns

    @property
    def columns(self) -> int:
        count: int = self.blocks.stop - self.blocks.start
        return count * BLOCK

    @property
    def start(self) -> int:
        """The text's row in the first column."""
        start: int = self.blocks.start
        return start * BLOCK

    def cut(self, first: int, last: int) -> CodedRun:
        """Columns first..last alone, both at blocks."""
        bounds = None if self.bounds is None else self.bounds.within(first, last, self.columns)
        at = self.blocks.start
        return CodedRun(self.codec, self.codes, slice(at + first // BLOCK, at + last // BLOCK), bounds)


@dataclass(frozen=True, slots=True)
class CodedPart:
    """A run of coded blocks. A backend that reads codes takes them as they are; others read `pieces`."""

    codec: Codec
    codes: tuple[Tensor, ...]  # of b blocks, each [K, b, ...]
    dtype: torch.dtype
    bounds: Bounds | None = None  # over the b * 64 columns
    start: int = 0  # the text's row in the first column

    @property
    def columns(self) -> int:
        return self.codes[0].shape[1] * BLOCK

    def cut(self, first: int, last: int) -> CodedPart:
        """Columns first..last alone, both at blocks."""
        codes = tuple(each[:, first // BLOCK : last // BLOCK] for each in self.codes)
        bounds = None if self.bounds is None else self.bounds.within(first, last, self.columns)
        return CodedPart(self.codec, codes, self.dtype, bounds, self.start + first)

    def pieces(self) -> Iterator[Part]:
        """The run in dense parts of at most 16 blocks: it never stands decoded as a whole."""
        for first in range(0, self.columns, PIECE_BLOCKS * BLOCK):
            piece = self.cut(first, min(first + PIECE_BLOCKS * BLOCK, self.columns))
            yield Part(*self.codec.decode(piece.codes, self.dtype), piece.bounds, piece.start)


class Codec(Protocol):
    """Blocks as small integers, and back."""

    @property
    def bits(self) -> int: ...

    def decode(self, codes: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [K, b * 64, D]."""
        ...


class Stage(Protocol):
    """The rows of one or more passes that are not text yet. Dropping a stage is free and leaves no trace."""

    def add(self, parents: Sequence[int]) -> slice:
        """Announce rows; row i continues stage row `parents[i]`, -1 is the text. Returns their place in the stage."""
        ...

    @property
    def depths(self) -> Sequence[int]:
        """Per row, how far behind the text's end: its position is `cache.length + depth`."""
        ...

    def put(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        """Keys and values [q, K, D] of `rows` at `layer`. A row may stop at a layer and resume in a later pass."""
        ...

    def parts(self, layer: int, rows: slice, queries: Tensor) -> Iterator[Part | CodedPart]:
        """All that `rows` may read at `layer`, themselves included. A cache may choose by the queries [q, H, D]."""
        ...

    def is_known(self, rows: slice) -> bool:
        """Whether it is known before any layer has run what `rows` will read: only then the rest may be asked for."""
        ...

    def runs(self, layer: int, rows: slice) -> Sequence[Run | CodedRun]:
        """The parts of `rows` at `layer`, by where they stand. The last run is dense, and holds the staged rows."""
        ...

    @property
    def by_layer(self) -> bool:
        """Whether runs differ between layers of one window."""
        ...

    @property
    def layers(self) -> int: ...

    @property
    def length(self) -> int:
        """Of the text before the stage."""
        ...

    @property
    def offset(self) -> int:
        """Where the stage's row 0 stands in the last run's buffers."""
        ...

    def filled(self, layer: int, rows: slice) -> None:
        """Keys and values of `rows` stand in the last run's buffers, put there by someone else."""
        ...


class Cache(Protocol):
    """The keys and values of one session, in all layers."""

    @property
    def length(self) -> int:
        """Committed rows."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        ...

    def open(self) -> Any:
        """A new stage behind the committed rows. Several may be open at once; a commit makes the others stale."""
        ...

    def commit(self, stage: Any, rows: Sequence[int]) -> None:
        """Make these stage rows text, in this order. Each must have been put in all layers."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on; a cache may forget more, down to a block's start."""
        ...

    def fork(self, length: int) -> Cache:
        """A second text with the same first `length` rows, shared and not copied."""
        ...

    def room(self, rows: int) -> Room:
        """What that many rows of text need, without what is staged and what stands empty, but with what growing takes.

        It depends on the shape alone: asked of an empty cache, on torch's `meta` device too.
        """
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All that the committed rows are, tensor by tensor, each with its name; a cache of this kind loads it."""
        ...

    def load_state(self, length: int, take: Take) -> None:
        """Become the cache of `length` rows whose state can be taken. This one must be empty."""
        ...
