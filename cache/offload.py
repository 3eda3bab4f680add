"""A low-bit copy of old blocks on the device, and all rows in a store below it (after SpeCache, 2503.16163).

Near blocks are dense, as in a quantized cache. Of the old ones each row reads a few exactly: those that its own query
asks for, by the bounds on a block's keys that the codes' scales hold anyhow (`longspec.cache.pages`), and the rest as
codes. So what a row reads depends on itself alone, and a pass fetches what its rows ask for together.
Fetched blocks stay for a while: the guess is that the next token asks for what this one and its draft asked for. A
wrong guess costs time and changes nothing. With `all_rows` there are no codes: every row is streamed from the store.
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
"""Old blocks that a row reads exactly: 1,024 rows."""

HELD_BLOCKS = 3 * EXACT_BLOCKS
"""Fetched blocks that stay on the device, per layer."""


class Store(Protocol):
    """Where whole blocks of rows lie, by layer and number."""

    @property
    def nbytes(self) -> int: ...

    def write(self, layer: int, block: int, rows: Tensor) -> None:
        """Rows [2, K, 64, D] of a block; the block of that number, if there was one, is gone."""
        ...

    def read(self, layer: int, block: int) -> Tensor:
        """The block's rows [2, K, 64, D], in the store's own memory or a copy."""
        ...

    def fork(self) -> Store:
        """A store with the same blocks, which goes its own way."""
        ...

    def room(self, nbytes: int) -> Room:
        """What that many bytes of rows take, and where."""
        ...


class HostStore:
    """Blocks in host memory, pinned where there is a GPU to copy to."""

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

    def fork(self) -> HostStore:
        twin = HostStore.__new__(HostStore)
        twin._pin, twin._blocks = self._pin, dict(self._blocks)
        return twin

    def room(self, nbytes: int) -> Room:
        return Room(0, host=nbytes)


class Offload(Quantized):
    """Keys and values of one session: near rows, codes of old blocks, and a store with all old rows."""

    def __init__(self, shape: Shape, store: Store, *, bits: int = 2, all_rows: bool = False) -> None:
        super().__init__(shape, Codec(bits))
        self.store = store
        self.all_rows = self.lossless = all_rows
        self.fetched = 0  # blocks that had to be read from the store
        self.asked = 0  # blocks that rows asked for
        self._held: list[OrderedDict[int, Tensor]] = [OrderedDict() for _ in shape.windows]

    @property
    def nbytes(self) -> int:
        """On the device; the store's own are `store.nbytes`."""
        return super().nbytes + sum(rows.nbytes for held in self._held for rows in held.values())

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
        """Beside the codes the held blocks; a layer's rows are there twice where its rows ask for all of them."""
        block = BLOCK * self.shape.row_bytes
        blocks = near_start(rows) // BLOCK
        codes = 2 * block if self.all_rows else super().room(rows).device
        read = min(blocks, PIECE_BLOCKS if self.all_rows else blocks) * block // self.shape.layers
        held = min(blocks, HELD_BLOCKS) * block
        return self.store.room(blocks * block)._replace(device=codes + held + 2 * read)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """As a quantized cache's, without codes where all rows are read, and `block.B` [layers, 2, K, 64, D]."""
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
        """The rows [2, K, b * 64, D] of these blocks; `buffer` holds those from `near.start` on."""
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
    """Rows behind an offloaded cache's text."""

    _cache: Offload

    def is_known(self, rows: slice) -> bool:
        return False  # the queries choose

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
    """[q, b] bool: for each row [q, H, D] the blocks it reads exactly, of those that it may read [q, b].

    The copy's scales hold each block's least and greatest keys.
    """
    _, step, low = coded.tensors[:3]
    least = low[:, :, 0].float()  # [K, b, D]
    greatest = least + step[:, :, 0].float() * ((1 << codec.bits) - 1)
    score = block_scores(queries, least, greatest, readable)
    best = score.topk(min(EXACT_BLOCKS, score.shape[1])).indices
    return torch.zeros_like(readable).scatter_(1, best, True) & readable


def _reading(columns: Tensor, blocks: Tensor | None = None) -> Bounds:
    """Bounds of rows that read these columns [q, n], or of `blocks` alone those that lie in them."""
    if blocks is not None:
        columns = columns.view(len(columns), -1, BLOCK)[:, blocks].flatten(1)
    first = torch.zeros(len(columns), dtype=torch.int64, device=columns.device)
    return Bounds(first, columns.any(1) * columns.shape[1], columns)
