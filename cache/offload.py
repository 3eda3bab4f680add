"""The offloaded cache: codes of old blocks on the device, exact rows in a store (after SpeCache, 2503.16163).

The residual window is dense, as in a quantized cache. Of the old blocks each token position reads up to `EXACT_BLOCKS`
exactly and the others as codes. Its own query selects them, by the bounds on a block's keys that the codes' scales
contain (`longspec.cache.pages`). So what a position reads doesn't depend on the other positions of its forward pass,
and a pass fetches the union of the selected blocks.
Fetched blocks stay on the device in an LRU cache: consecutive tokens and their drafts mostly select the same ones. With
`all_rows` there are no codes: all old blocks are streamed from the store.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from longspec.cache.codes import Codec
from longspec.cache.dense import near_start
from longspec.cache.pages import block_scores
from longspec.cache.quantized import Quantized, QuantizedStage
from longspec.cache.stage import BLOCK, PIECE_BLOCKS, Bounds, Room, Segment, Shape, Take

__all__ = ["HostStore", "Offload", "Store"]

EXACT_BLOCKS = 16
"""Old blocks that a token position reads exactly: 1,024 positions."""

HELD_BLOCKS = 3 * EXACT_BLOCKS
"""Capacity of the LRU cache of fetched blocks, per layer."""


class Store(Protocol):
    """Storage of whole blocks of keys and values, by layer and block number."""

    @property
    def nbytes(self) -> int: ...

    def write(self, layer: int, block: int, rows: Tensor) -> None:
        """Write a block's keys and values [2, K, 64, D], overwriting the block if it exists."""
        ...

    def read(self, layer: int, block: int) -> Tensor:
        """A block's keys and values [2, K, 64, D], in the store's own memory or a copy."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """The blocks that are in memory."""
        ...

    def fork(self) -> Store:
        """An independent store with the same blocks."""
        ...

    def room(self, nbytes: int) -> Room:
        """Memory that `nbytes` bytes of blocks take in this store: on the device, the host or the disk."""
        ...


class HostStore:
    """Blocks in host memory, pinned if the device is a GPU."""

    def __init__(self, shape: Shape) -> None:
        self._pin = shape.device.type == "cuda"
        self._blocks: dict[tuple[int, int], Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._blocks.values())

    def write(self, layer: int, block: int, rows: Tensor) -> None:
        kept = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=self._pin)
        kept.copy_(rows)
        self._blocks[layer, block] = kept

    def read(self, layer: int, block: int) -> Tensor:
        return self._blocks[layer, block]

    def tensors(self) -> Iterator[Tensor]:
        yield from self._blocks.values()

    def fork(self) -> HostStore:
        twin = HostStore.__new__(HostStore)
        twin._pin, twin._blocks = self._pin, dict(self._blocks)
        return twin

    def room(self, nbytes: int) -> Room:
        return Room(0, host=nbytes)


class Offload(Quantized):
    """Keys and values of one session: residual window, codes of old blocks, and a store with all old blocks."""

    def __init__(self, shape: Shape, store: Store, *, bits: int = 2, all_rows: bool = False) -> None:
        super().__init__(shape, Codec(bits))
        self.store = store
        self.all_rows = self.lossless = all_rows
        self.fetched = 0  # blocks read from the store (cache misses)
        self.asked = 0  # blocks selected for exact reading
        self._held: list[OrderedDict[int, Tensor]] = [OrderedDict() for _ in shape.windows]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without the store's (`store.nbytes`)."""
        return sum(tensor.nbytes for tensor in self._on_device())

    def tensors(self) -> Iterator[Tensor]:
        yield from self._on_device()
        yield from self.store.tensors()

    def _on_device(self) -> Iterator[Tensor]:
        yield from super().tensors()
        for held in self._held:
            yield from held.values()

    def open(self) -> OffloadStage:
        self._forget_codes_from(self.length)
        return OffloadStage(self, self.near.open())

    def retire(self, row: int) -> None:
        for layer, buffer in enumerate(self.near.buffers):
            for block in range(self.near.start // BLOCK, row // BLOCK):
                at = block * BLOCK - self.near.start
                self._held[layer].pop(block, None)
                self.store.write(layer, block, buffer[:, :, at : at + BLOCK])
        if self.all_rows:
            self.near.forget(row)
        else:
            super().retire(row)

    def fork(self, length: int) -> Offload:
        twin = Offload(self.shape, self.store.fork(), bits=self.codec.bits, all_rows=self.all_rows)
        self._share(twin, length)
        return twin

    def room(self, rows: int) -> Room:
        """Codes, residual window and fetched blocks; and twice the blocks that one layer may read at once."""
        block = BLOCK * self.shape.row_bytes
        blocks = near_start(rows) // BLOCK
        codes = 2 * block if self.all_rows else super().room(rows).device
        read = min(blocks, PIECE_BLOCKS if self.all_rows else blocks) * block // self.shape.layers
        held = min(blocks, HELD_BLOCKS) * block
        return self.store.room(blocks * block)._replace(device=codes + held + 2 * read)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """State of a quantized cache, without codes if `all_rows`; and `block.B` [layers, 2, K, 64, D]."""
        yield from self.near.state() if self.all_rows else super().state()
        for block in range(self.near.start // BLOCK):
            yield f"block.{block}", torch.stack([self.store.read(layer, block) for layer in range(self.shape.layers)])

    def load_state(self, length: int, take: Take) -> None:
        if self.all_rows:
            self.near.load_state(length, take)
        else:
            super().load_state(length, take)
        s = self.shape
        for block in range(self.near.start // BLOCK):
            rows = take(f"block.{block}", (s.layers, 2, s.key_heads, BLOCK, s.head_dim), s.dtype)
            for layer in range(s.layers):
                self.store.write(layer, block, rows[layer])

    def exact(self, layer: int, blocks: Sequence[int], buffer: Tensor) -> Tensor:
        """Exact keys and values [2, K, b * 64, D] of these blocks; `buffer` holds positions from `near.start` on."""
        held, rows = self._held[layer], []
        self.asked += len(blocks)
        for block in blocks:
            at = block * BLOCK - self.near.start
            if at >= 0:
                rows.append(buffer[:, :, at : at + BLOCK])
                continue
            if block not in held:
                self.fetched += 1
                held[block] = self.store.read(layer, block).to(self.shape.device, non_blocking=True)
            held.move_to_end(block)
            rows.append(held[block])
        while len(held) > HELD_BLOCKS:
            held.popitem(last=False)
        return torch.cat(rows, 2)


class OffloadStage(QuantizedStage):
    """Stage of an offloaded cache."""

    _cache: Offload

    def is_known(self, rows: slice) -> bool:
        return False  # the queries select blocks

    def far_parts(self, layer: int, blocks: slice, bounds: Bounds | None, queries: Tensor) -> Iterator[Segment]:
        cache = self._cache
        if cache.all_rows:
            n = (blocks.stop - blocks.start) * BLOCK
            for start in range(blocks.start, blocks.stop, PIECE_BLOCKS):
                piece = range(start, min(start + PIECE_BLOCKS, blocks.stop))
                low = (start - blocks.start) * BLOCK
                within = bounds.within(low, low + len(piece) * BLOCK, n) if bounds is not None else None
                keys, values = cache.exact(layer, piece, self.rows(layer))
                yield Segment.dense(keys, values, within, start * BLOCK)
            return
        coded = self.coded(layer, blocks, bounds)
        n = (blocks.stop - blocks.start) * BLOCK
        allowed = torch.ones(len(queries), n, dtype=torch.bool) if bounds is None else bounds.allowed(n)
        chosen = _asked_for(queries, coded, cache.codec, allowed[:, BLOCK - 1 :: BLOCK])  # [q, b]
        union = chosen.any(0).nonzero()[:, 0]
        keys, values = cache.exact(layer, (union + blocks.start).tolist(), self.rows(layer))
        columns = chosen.repeat_interleave(BLOCK, 1)
        yield Segment.dense(keys, values, _reading(allowed & columns, union))
        if not bool(chosen[allowed[:, BLOCK - 1 :: BLOCK]].all()):
            yield replace(coded, bounds=_reading(allowed & ~columns))


def _asked_for(queries: Tensor, coded: Segment, codec: Codec, readable: Tensor) -> Tensor:
    """[q, b] bool: the blocks that each query [q, H, D] reads exactly, of the readable ones [q, b].

    Per channel the codes' scales give a block's least and greatest key: low and low + step * (2^bits - 1).
    """
    _, step, low = coded.tensors[:3]
    least = low[:, :, 0].float()  # [K, b, D]
    greatest = least + step[:, :, 0].float() * ((1 << codec.bits) - 1)
    score = block_scores(queries, least, greatest, readable)
    best = score.topk(min(EXACT_BLOCKS, score.shape[1])).indices
    return torch.zeros_like(readable).scatter_(1, best, True) & readable


def _reading(columns: Tensor, blocks: Tensor | None = None) -> Bounds:
    """Bounds for a boolean mask of columns [q, n]; with `blocks`, for a segment of these blocks only."""
    if blocks is not None:
        columns = columns.view(len(columns), -1, BLOCK)[:, blocks].flatten(1)
    first = torch.zeros(len(columns), dtype=torch.int64, device=columns.device)
    return Bounds(first, columns.any(1) * columns.shape[1], columns)
