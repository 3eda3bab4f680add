"""The offloaded cache (SpeCache, 2503.16163): codes of old blocks on the device, exact rows in a store.

The residual window is dense, as in a quantized cache: at most 128 positions. Of the old blocks each position reads
`CHOSEN` rows for each key head exactly and all others as 2-bit codes in groups of 32. Its own query selects them, by
its scores over the codes (`longspec.cache.choice`). So what a position reads doesn't depend on the other positions of
its forward pass, and a pass needs the union of the selected rows: those that the pass before selected, or that were
fetched ahead, are on the device (`longspec.cache.fetched`). With `all_rows` there are no codes: all old blocks are
streamed from the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longspec.cache.choice import choose
from longspec.cache.codes import GroupCodec
from longspec.cache.dense import near_start
from longspec.cache.fetched import HELD, Fetched, Rows
from longspec.cache.native import copy_rows
from longspec.cache.quantized import Quantized, QuantizedStage
from longspec.cache.stage import BLOCK, PIECE_BLOCKS, Bounds, Room, Segment, Shape, Take

__all__ = ["HostStore", "Offload", "Store"]


class Store(Rows, Protocol):
    """Storage of whole blocks of keys and values, by layer and block number, whose rows can be read one by one: a key
    head's key and value of a position stand behind each other.
    """

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
    """Blocks [K, 64, 2, D] in host memory, pinned if the device is a GPU."""

    def __init__(self, shape: Shape) -> None:
        self._pin = shape.device.type == "cuda"
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._at = [np.empty(0, np.int64) for _ in shape.windows]  # of each layer, the blocks' addresses

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._blocks.values())

    def write(self, layer: int, block: int, rows: Tensor) -> None:
        heads, dim = rows.shape[1], rows.shape[3]
        kept = torch.empty(heads, BLOCK, 2, dim, dtype=rows.dtype, pin_memory=self._pin)
        kept.copy_(rows.permute(1, 2, 0, 3))
        self._blocks[layer, block] = kept
        if block >= len(self._at[layer]):
            self._at[layer] = np.concatenate((self._at[layer], np.zeros(block + 1, np.int64)))
        self._at[layer][block] = kept.data_ptr()

    def read(self, layer: int, block: int) -> Tensor:
        return self._blocks[layer, block].permute(2, 0, 1, 3)

    def gather(self, layer: int, heads: Any, positions: Any, to: Any, places: Any) -> None:
        place = heads * BLOCK + positions % BLOCK
        copy_rows(self._at[layer][positions // BLOCK] + place * to.shape[1], to, places)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._blocks.values()

    def fork(self) -> HostStore:
        twin = HostStore.__new__(HostStore)
        twin._pin, twin._blocks, twin._at = self._pin, dict(self._blocks), [each.copy() for each in self._at]
        return twin

    def room(self, nbytes: int) -> Room:
        return Room(0, host=nbytes)


class Offload(Quantized):
    """Keys and values of one session: residual window, codes of old blocks, and a store with all old blocks."""

    def __init__(self, shape: Shape, store: Store, *, all_rows: bool = False) -> None:
        super().__init__(shape, GroupCodec())
        self.store = store
        self.all_rows = self.lossless = all_rows
        self.fetched = Fetched(shape, store)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without the store's (`store.nbytes`)."""
        return sum(tensor.nbytes for tensor in self._on_device())

    def tensors(self) -> Iterator[Tensor]:
        yield from self._on_device()
        yield from self.store.tensors()

    def _on_device(self) -> Iterator[Tensor]:
        yield from super().tensors()
        yield from self.fetched.tensors()

    def open(self) -> OffloadStage:
        self._forget_codes_from(self.length)
        return OffloadStage(self, self.near.open())

    def commit(self, stage: QuantizedStage, rows: Sequence[int]) -> None:
        super().commit(stage, rows)
        self.fetched.launch()

    def truncate(self, length: int) -> None:
        super().truncate(length)
        if not self.length:
            self.fetched.forget()

    def retire(self, row: int) -> None:
        for layer, buffer in enumerate(self.near.buffers):
            for block in range(self.near.start // BLOCK, row // BLOCK):
                at = block * BLOCK - self.near.start
                self.store.write(layer, block, buffer[:, :, at : at + BLOCK])
        if self.all_rows:
            self.near.forget(row)
        else:
            super().retire(row)

    def fork(self, length: int) -> Offload:
        twin = Offload(self.shape, self.store.fork(), all_rows=self.all_rows)
        self._share(twin, length)
        return twin

    def room(self, rows: int) -> Room:
        """Codes, residual window and held rows; and three times what one layer may read at once: rows as they come
        from the store, those of a pass, and the scores of the choice, which are fewer bytes.
        """
        block = BLOCK * self.shape.row_bytes
        blocks = near_start(rows) // BLOCK
        codes = 2 * block if self.all_rows else super().room(rows).device
        held = 0 if self.all_rows else min(blocks * BLOCK, HELD) * self.shape.row_bytes
        read = min(blocks, PIECE_BLOCKS if self.all_rows else blocks) * block // self.shape.layers
        return self.store.room(blocks * block)._replace(device=codes + held + 3 * read)

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

    def blocks(self, layer: int, blocks: Sequence[int], buffer: Tensor) -> Tensor:
        """Keys and values [2, K, b * 64, D] of these blocks; `buffer` holds positions from `near.start` on."""
        rows = []
        for block in blocks:
            at = block * BLOCK - self.near.start
            whole = buffer[:, :, at : at + BLOCK] if at >= 0 else self.store.read(layer, block)
            rows.append(whole.to(self.shape.device, non_blocking=True))
        return torch.cat(rows, 2)


class OffloadStage(QuantizedStage):
    """Stage of an offloaded cache."""

    _cache: Offload

    def is_known(self, rows: slice) -> bool:
        return False  # the queries select rows

    def far_parts(self, layer: int, blocks: slice, bounds: Bounds | None, queries: Tensor) -> Iterator[Segment]:
        cache = self._cache
        if cache.all_rows:
            n = (blocks.stop - blocks.start) * BLOCK
            for start in range(blocks.start, blocks.stop, PIECE_BLOCKS):
                piece = range(start, min(start + PIECE_BLOCKS, blocks.stop))
                low = (start - blocks.start) * BLOCK
                within = bounds.within(low, low + len(piece) * BLOCK, n) if bounds is not None else None
                keys, values = cache.blocks(layer, piece, self.rows(layer))
                yield Segment.dense(keys, values, within, start * BLOCK)
            return
        coded = self.coded(layer, blocks, bounds)
        choice = choose(queries, coded)
        chosen = cache.fetched.gather(layer, choice, coded, self.rows(layer), cache.near.start)
        yield replace(coded, chosen=chosen)
