"""What every cache speaks: KV segments to read, stages to write to, and the commit between them.

    cache.open() -> stage        rows of a pass that are not text yet
    stage.add(parents)           announces rows, returns their place
    stage.put(layer, rows, ...)  their keys and values at one layer
    stage.parts(layer, rows)     the segments that hold everything those rows may read at that layer
    cache.commit(stage, rows)    these rows are text now; the rest never were

`Cache` and `Stage` are base classes: a new kind has the abstract members, and says by values what else it can do.

Letters: q rows that read, n columns of a segment, b blocks, K key heads, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longspec.cache.shape import Shape
from longspec.errors import LongspecError

if TYPE_CHECKING:
    from longspec.cache.choice import Chosen

__all__ = ["BLOCK", "Bounds", "Cache", "Codec", "Room", "Segment", "Shape", "Stage", "Take"]

BLOCK = 64
"""Rows in a block: the one unit of growth, quantization, paging, offload, sharing and snapshots."""

PIECE_BLOCKS = 16
"""Coded blocks that are decoded at once: 1,024 rows stay in a core's L2, and cost one call of each operator."""

Take = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""Gives a tensor of a cache's state by its name, in the shape and dtype that it must have; it lies on the host."""


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


@dataclass(frozen=True, eq=False)
class Segment:
    """A KV segment: columns of keys and values that attention can read, dense or coded, in one layer or in each of all.

    What a cache gives of all layers stands in the same place in each (`at` takes one of them); `tensors`, `keys` and
    `values` are of a segment of one layer. Bounds of None: every row reads every column.
    """

    # Of each layer, dense: keys and values, each [K, capacity, D] (or both as [2, K, capacity, D]). Coded: the codec's
    # tensors, each [K, capacity / 64, ...].
    layers: Sequence[Sequence[Tensor] | Tensor]
    column: int  # of these tensors, where the segment begins; at a block's start where it is coded
    columns: int
    bounds: Bounds | None = None
    start: int = 0  # the token position of the first column; staged rows count on from the text's last
    codec: Codec | None = None  # None: dense
    dtype: torch.dtype | None = None  # that codes are decoded to
    chosen: Chosen | None = None  # columns of one layer's codes that rows read exactly, each its own

    @classmethod
    def dense(cls, keys: Tensor, values: Tensor, bounds: Bounds | None = None, start: int = 0) -> Segment:
        """All columns of keys and values [K, n, D] of one layer."""
        return cls(((keys, values),), 0, keys.shape[1], bounds, start)

    @classmethod
    def coded(
        cls,
        codec: Codec,
        codes: tuple[Tensor, ...],
        dtype: torch.dtype,
        bounds: Bounds | None = None,
        start: int = 0,
    ) -> Segment:
        """All columns of a codec's tensors of one layer, each [K, b, ...]: b blocks, decoded to `dtype`."""
        return cls((codes,), 0, codes[0].shape[1] * BLOCK if codes else 0, bounds, start, codec, dtype)

    @property
    def is_coded(self) -> bool:
        return self.codec is not None

    @property
    def key_heads(self) -> int:
        return len(self.layers[0][0])

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Of one layer: keys and values [K, n, D], or the codec's tensors, each [K, b, ...]; exactly these columns."""
        (tensors,) = self.layers
        unit = 1 if self.codec is None else BLOCK
        first, last = self.column // unit, (self.column + self.columns) // unit
        # A view that is the whole tensor costs a microsecond, in each layer.
        return tuple(each if last - first == each.shape[1] else each[:, first:last] for each in tensors)

    @property
    def keys(self) -> Tensor:
        """[K, n, D], of a dense segment of one layer."""
        return self.tensors[0]

    @property
    def values(self) -> Tensor:
        """[K, n, D], of a dense segment of one layer."""
        return self.tensors[1]

    def at(self, layer: int) -> Segment:
        """The same columns of one layer alone."""
        return Segment(
            (self.layers[layer],), self.column, self.columns, self.bounds, self.start, self.codec, self.dtype
        )

    def cut(self, first: int, last: int) -> Segment:
        """Columns first..last alone; both at blocks where it is coded."""
        bounds = None if self.bounds is None else self.bounds.within(first, last, self.columns)
        column, start = self.column + first, self.start + first
        chosen = None if self.chosen is None else self.chosen.within(first, last)
        return Segment(self.layers, column, last - first, bounds, start, self.codec, self.dtype, chosen)

    def pieces(self) -> Iterator[Segment]:
        """One layer's columns as dense segments: of codes at most 16 blocks each, which never stand decoded at once."""
        if self.codec is None:
            yield self
            return
        assert self.dtype is not None
        for first in range(0, self.columns, PIECE_BLOCKS * BLOCK):
            piece = self.cut(first, min(first + PIECE_BLOCKS * BLOCK, self.columns))
            keys, values = self.codec.decode(piece.tensors, self.dtype)
            yield Segment(((keys, values),), 0, piece.columns, piece.bounds, piece.start, chosen=piece.chosen)


class Codec(Protocol):
    """Blocks as small integers, and back."""

    @property
    def bits(self) -> int: ...

    def decode(self, codes: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [K, b * 64, D]."""
        ...

    def upper(self, codes: tuple[Tensor, ...]) -> tuple[Codec, tuple[Tensor, ...]]:
        """A coarser codec and its codes of the same blocks, for guessing; the same where there is none."""
        ...


class Stage(ABC):
    """The token positions of one or more forward passes that are not text yet. Dropping a stage leaves no trace.

    A stage has `add`, `depths`, `put` and `parts`. The rest is for kernels that run all layers in one call, and may be
    left as it is: they ask `is_known` first.
    """

    length: int
    """Rows of the text before the stage."""

    states: Any = None
    """The staged rows of layers with a state (`longspec.cache.recurrent.StateStage`); None where there are none."""

    by_layer: bool = True
    """Whether runs differ between layers of one window."""

    @abstractmethod
    def add(self, parents: Sequence[int]) -> slice:
        """Announce rows; row i continues stage row `parents[i]`, -1 is the text. Returns their place in the stage."""

    @property
    @abstractmethod
    def depths(self) -> Sequence[int]:
        """Per row, how far behind the text's end: its position is `cache.length + depth`."""

    @abstractmethod
    def put(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        """Keys and values [q, K, D] of `rows` at `layer`. A row may stop at a layer and resume in a later pass."""

    @abstractmethod
    def parts(self, layer: int, rows: slice, queries: Tensor) -> Iterator[Segment]:
        """The segments of one layer that `rows` may read at `layer`, themselves included. A cache may choose by the
        queries [q, H, D].
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all other rows: these, rising and each with its parent, are the stage's first ones from now on. A row
        must have been put in every layer in which a later one was.
        """
        raise NotImplementedError(f"{type(self).__name__} can't forget some of its rows")

    def check_complete(self, rows: Sequence[int]) -> None:  # noqa: B027 - what is checked elsewhere needn't be here
        """Raise ValueError unless these rows can be committed: they hold keys and values in all layers."""

    def is_known(self, rows: slice) -> bool:
        """Whether it is known before any layer has run what `rows` will read: only then the rest may be asked for."""
        return False

    def runs(self, layer: int, rows: slice) -> Sequence[Segment]:
        """The segments, of all layers, that `rows` read at `layer`. The last is dense, and holds the staged rows."""
        raise NotImplementedError(f"{type(self).__name__} doesn't know what its rows will read")

    def reads(self, rows: slice) -> list[int] | None:
        """Of each row, a bit for each staged row that it reads; None where that isn't told."""
        return None

    @property
    def layers(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} doesn't know what its rows will read")

    @property
    def offset(self) -> int:
        """Where the stage's row 0 stands in the last run's tensors."""
        raise NotImplementedError(f"{type(self).__name__} doesn't know what its rows will read")

    def filled(self, layers: Sequence[int], rows: slice) -> None:
        """Keys and values of `rows` stand in these layers' last runs, put there by someone else."""
        raise NotImplementedError(f"{type(self).__name__} doesn't know what its rows will read")


class Cache(ABC):
    """The keys and values of one session, in all layers.

    What a cache can do beside that is asked for by these values, never by its type or its name.
    """

    length: int
    """Committed rows."""

    lossless: bool = False
    """Whether rows are read as they were written; a text of another kind of cache is exact to its own kind only."""

    can_cut_anywhere: bool = False
    """Whether `truncate` and `fork` give exactly the length that they are asked for."""

    in_one_piece: bool = False
    """Whether attention reads all committed rows of a layer at once, as dense keys and values."""

    can_become: tuple[str, ...] = ()
    """Names in CACHES of the kinds that `take_rows` makes of this one, the largest first: what to shrink to."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """What holds the rows in memory, what other texts share of it included: all that `fork` may share."""

    @abstractmethod
    def open(self) -> Any:
        """A new stage behind the committed rows. Several may be open at once; a commit makes the others stale."""

    @abstractmethod
    def commit(self, stage: Any, rows: Sequence[int]) -> None:
        """Make these stage rows text, in this order. Each must have been put in all layers."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on; a cache may forget more, down to a block's start."""

    @abstractmethod
    def fork(self, length: int) -> Cache:
        """A second text with the same first `length` rows, shared and not copied; a cache may share fewer."""

    @abstractmethod
    def room(self, rows: int) -> Room:
        """The planned bytes of that many rows of text, without what is staged and what stands empty, but with what
        growing takes.

        It depends on the shape alone: asked of an empty cache, on torch's `meta` device too.
        """

    def mark(self) -> None:  # noqa: B027 - most caches have nothing to do
        """The text up to here will be continued more than once: a cache that can't be cut anywhere keeps what it needs
        to be cut back to about here.
        """

    def take_rows(self, other: Any) -> None:
        """Become the cache of another one's rows, whose `can_become` names this kind, and empty that one by and by."""
        raise NotImplementedError(f"{type(self).__name__} takes no other cache's rows")

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All that the committed rows are, tensor by tensor, each with its name; a cache of this kind loads it."""
        raise LongspecError("This kind of cache can't be kept in a file; take another --cache.")

    def load_state(self, length: int, take: Take) -> None:
        """Become the cache of `length` rows whose state can be taken. This one must be empty."""
        raise LongspecError("This kind of cache can't be read from a file; take another --cache.")
