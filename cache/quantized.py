"""Quantized KV caches (int8, int4, int2): old blocks as codes, a dense residual window of the newest ones.

What a token position reads depends on the position alone, never on its forward pass: a position of block b reads blocks
up to b - 2 as codes, and b - 1 and b dense (`near_start`). If a pass crosses a block border, its positions differ in
this: a block is then held in both forms, and each row's bounds say which one it reads. A block is quantized when the
first position reads it as codes, so that at most two blocks and the staged rows are dense.

The residual window is a `Dense` cache whose start moves along. The capacity of a layer's codes grows by a 64th, at
least a block: a small step, so that unused capacity doesn't eat up what fewer bits save.
A chain that is staged over several blocks (a prefill chunk) is encoded as its own later rows need it. Those codes lie
behind the committed ones, and are kept if the chain is committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longspec.cache.codes import Codec, Codes
from longspec.cache.dense import Dense, DenseStage, near_start
from longspec.cache.stage import BLOCK, PIECE_BLOCKS, Bounds, Cache, Room, Segment, Shape, Stage, Take

__all__ = ["Quantized", "QuantizedStage"]

_GROWTH = 64  # capacity grows by a fraction of 1 / _GROWTH


class Quantized(Cache):
    """Keys and values of one session. See `longspec.cache.stage.Cache` for the verbs."""

    def __init__(self, shape: Shape, codec: Codec) -> None:
        self.shape = shape
        self.codec = codec
        self.near = Dense(shape, near=True)
        self._codes: list[Codes] = [codec.empty(shape, 0) for _ in shape.windows]
        self._coded = [0] * shape.layers  # number of encoded blocks, from position 0 on
        self._lent = 0  # blocks before this one are read by a fork and must not be overwritten

    @classmethod
    def of_dense(cls, dense: Dense, codec: Codec) -> Quantized:
        """Convert a dense cache, which must not be used afterwards."""
        quantized = cls(dense.shape, codec)
        quantized.take_rows(dense)
        return quantized

    def take_rows(self, other: Dense) -> None:
        """Take over a dense cache's sequence, quantizing layer by layer; `other` must not be used afterwards.

        Its keys and values were computed with dense attention, so that the continuation is neither that of a dense
        cache nor that of a cache that was quantized from the start.
        """
        start = near_start(other.length)
        blocks = start // BLOCK
        self.near.reserve(other.length - start)
        for layer, near in enumerate(self.near.buffers):
            rows = other.rows(layer)
            self._reserve(layer, blocks, own=True)
            for first in range(0, blocks, PIECE_BLOCKS):
                last = min(first + PIECE_BLOCKS, blocks)
                keys, values = (run.unflatten(1, (-1, BLOCK)) for run in rows[:, :, first * BLOCK : last * BLOCK])
                for old, new in zip(self._codes[layer], self.codec.encode(keys, values), strict=True):
                    old[:, first:last] = new
            near[:, :, : other.length - start] = rows[:, :, start:]
            other.drop(layer)
        self.near.begin(start, other.length)
        self._coded = [blocks] * self.shape.layers

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.near.length

    def tensors(self) -> Iterator[Tensor]:
        yield from self.near.tensors()
        for codes in self._codes:
            yield from codes

    def open(self) -> QuantizedStage:
        self._forget_codes_from(self.length)
        return QuantizedStage(self, self.near.open())

    def commit(self, stage: QuantizedStage, rows: Sequence[int]) -> None:
        kept = len(rows)
        stays = stage.near.behind and list(rows) == list(range(kept))
        if not stays:
            self._forget_codes_from(self.length)
        self.near.commit(stage.near, rows)
        self._forget_codes_from(self.length)
        if near_start(self.length) > self.near.start:
            self.retire(near_start(self.length))

    def truncate(self, length: int) -> None:
        """Truncate within the residual window. Further back the new residual window would be codes only: the cache is
        then emptied, to length 0.
        """
        self.near.truncate(length if near_start(length) >= self.near.start or length == 0 else 0)
        self._forget_codes_from(self.length)

    def fork(self, length: int) -> Quantized:
        """A fork that shares the codes; if `length` is before the residual window it is empty."""
        twin = Quantized(self.shape, self.codec)
        self._share(twin, length)
        return twin

    def room(self, rows: int) -> Room:
        """Codes of the old blocks, one layer's a second time for growth, and two dense blocks."""
        one = self.codec.empty(self.shape, 1)
        layer = near_start(rows) // BLOCK * sum(tensor.nbytes for tensor in one)
        return Room(layer * (self.shape.layers + 1) + 2 * BLOCK * self.shape.row_bytes)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The residual window, and `codes.LAYER.I` [K, blocks, ...] of the blocks before it."""
        yield from self.near.state()
        for layer in range(self.shape.layers):
            for i, codes in enumerate(self.codes(layer, slice(0, self.near.start // BLOCK))):
                yield f"codes.{layer}.{i}", codes

    def load_state(self, length: int, take: Take) -> None:
        self.near.load_state(length, take)
        blocks = self.near.start // BLOCK
        for layer in range(self.shape.layers):
            self._reserve(layer, blocks, own=True)
            for i, codes in enumerate(self.codes(layer, slice(0, blocks))):
                codes.copy_(take(f"codes.{layer}.{i}", tuple(codes.shape), codes.dtype))
            self._coded[layer] = blocks

    def retire(self, row: int) -> None:
        """Encode and free the dense rows before position `row`, which later positions read as codes."""
        for layer in range(self.shape.layers):
            self.encode(layer, row // BLOCK, self.near.buffers[layer])
        self.near.forget(row)

    def codes(self, layer: int, blocks: slice) -> Codes:
        return tuple(tensor[:, blocks] for tensor in self._codes[layer])

    def encode(self, layer: int, blocks: int, buffer: Tensor) -> None:
        """Ensure that the first `blocks` blocks are encoded. buffer: a layer's dense rows from `near.start` on."""
        done = self._coded[layer]
        if blocks <= done:
            return
        at = slice(done * BLOCK - self.near.start, blocks * BLOCK - self.near.start)
        keys, values = (rows.unflatten(1, (-1, BLOCK)) for rows in buffer[:, :, at])
        self._reserve(layer, blocks, own=done >= self._lent)
        for old, new in zip(self._codes[layer], self.codec.encode(keys, values), strict=True):
            old[:, done:blocks] = new
        self._coded[layer] = blocks

    def _share(self, twin: Quantized, length: int) -> None:
        if 0 <= length <= self.length and near_start(length) >= self.near.start:
            twin.near = self.near.copy(length)
            blocks = length // BLOCK
            twin._coded = [min(done, blocks) for done in self._coded]
            twin._codes = [self.codes(i, slice(0, done)) for i, done in enumerate(twin._coded)]
            twin._lent = self._lent = max(self._lent, blocks)

    def _reserve(self, layer: int, blocks: int, *, own: bool) -> None:
        """Grow the codes' tensors to `blocks` blocks. Unless `own`, copy them: a fork reads blocks to be written."""
        capacity = self._codes[layer][0].shape[1]
        if blocks > capacity or not own:
            grown = self.codec.empty(self.shape, max(blocks, capacity + capacity // _GROWTH))
            for old, new in zip(self._codes[layer], grown, strict=True):
                new[:, :capacity] = old
            self._codes[layer] = grown

    def _forget_codes_from(self, row: int) -> None:
        """Invalidate codes of blocks that end after position `row`: their rows may not be committed."""
        self._coded = [min(done, row // BLOCK) for done in self._coded]


class QuantizedStage(Stage):
    """Stage of a quantized cache."""

    by_layer = False

    def __init__(self, cache: Quantized, near: DenseStage) -> None:
        self.near = near
        self._cache = cache
        self._length = cache.length
        self._bounds: dict[tuple[int, int, int | None], tuple[slice, Bounds | None]] = {}

    @property
    def depths(self) -> Sequence[int]:
        return self.near.depths

    @property
    def layers(self) -> int:
        return self._cache.shape.layers

    @property
    def length(self) -> int:  # type: ignore[override]
        return self._length

    @property
    def offset(self) -> int:
        return self.near.offset

    def add(self, parents: Sequence[int]) -> slice:
        rows = self.near.add(parents)
        deepest = max(self.depths[rows], default=0)
        staged_blocks = near_start(self._length + deepest) > self._length // BLOCK * BLOCK
        if staged_blocks and not (self.near.behind and self.near.is_chain):
            raise ValueError(f"a tree can't be {deepest} rows deep: its rows would read each other as codes")
        return rows

    def put(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        self.near.put(layer, rows, keys, values)

    def filled(self, layers: Sequence[int], rows: slice) -> None:
        self.near.filled(layers, rows)

    def keep(self, rows: Sequence[int]) -> None:
        self.near.keep(rows)
        self._bounds.clear()
        self._cache._forget_codes_from(self._length)

    def check_complete(self, rows: Sequence[int]) -> None:
        self.near.check_complete(rows)

    def reads(self, rows: slice) -> list[int]:
        return self.near.reads(rows)

    def is_known(self, rows: slice) -> bool:
        """True if all blocks that `rows` read as codes are committed."""
        return near_start(self._length + max(self.depths[rows])) <= self._length

    def runs(self, layer: int, rows: slice) -> list[Segment]:
        cache, (blocks, bounds) = self._cache, self._far(rows, self._cache.shape.windows[layer])
        near: list[Segment] = [*self.near.runs(layer, rows)]
        if blocks.stop == blocks.start:
            return near
        if min(cache._coded) < blocks.stop:
            for each in range(cache.shape.layers):
                cache.encode(each, blocks.stop, self.rows(each))
        first, columns = blocks.start * BLOCK, (blocks.stop - blocks.start) * BLOCK
        far = Segment(cache._codes, first, columns, bounds, first, cache.codec, cache.shape.dtype)
        return [far, *near]

    def parts(self, layer: int, rows: slice, queries: Tensor) -> Iterator[Segment]:
        blocks, bounds = self._far(rows, self._cache.shape.windows[layer])
        if blocks.stop > blocks.start:
            yield from self.far_parts(layer, blocks, bounds, queries)
        yield from self.near.parts(layer, rows, queries)

    def far_parts(self, layer: int, blocks: slice, bounds: Bounds | None, queries: Tensor) -> Iterator[Segment]:
        """Segments of the old blocks `blocks`, with the bounds of each row of `queries`."""
        yield self.coded(layer, blocks, bounds)

    def coded(self, layer: int, blocks: slice, bounds: Bounds | None) -> Segment:
        cache = self._cache
        cache.encode(layer, blocks.stop, self.rows(layer))
        codes = cache.codes(layer, blocks)
        return Segment.coded(cache.codec, codes, cache.shape.dtype, bounds, blocks.start * BLOCK)

    def rows(self, layer: int) -> Tensor:
        """Dense rows [2, K, n, D] from `near.start` on. A stage with buffers of its own isn't included: it is too short
        for its own blocks to be read as codes.
        """
        return self.near.buffers[layer] if self.near.behind else self._cache.near.buffers[layer]

    def _far(self, rows: slice, window: int | None) -> tuple[slice, Bounds | None]:
        """The blocks that any of `rows` reads as codes, and each row's bounds in them; cached over the layers."""
        key = (rows.start, rows.stop, window)
        if key not in self._bounds:
            self._bounds[key] = self._measure(rows, window)
        return self._bounds[key]

    def _measure(self, rows: slice, window: int | None) -> tuple[slice, Bounds | None]:
        positions = torch.tensor([self._length + depth for depth in self.depths[rows]])
        last = ((positions // BLOCK - 1) * BLOCK).clamp_(min=0)
        first = torch.zeros_like(last) if window is None else (positions - window + 1).clamp_(min=0)
        first = torch.minimum(first, last)
        if not bool((reading := first < last).any()):
            return slice(0, 0), None
        blocks = slice(int(first[reading].min()) // BLOCK, int(last.max()) // BLOCK)
        first, last = ((bound - blocks.start * BLOCK).clamp_(min=0) for bound in (first, last))
        if not bool(first.any()) and bool((last == last.max()).all()):
            return blocks, None
        device = self._cache.shape.device
        return blocks, Bounds(first.to(device), last.to(device))
