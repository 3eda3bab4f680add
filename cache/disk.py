"""File store of the offloaded cache.

Blocks are written once, a layer's [K, 64, 2, D] at byte `(block * layers + layer) * block_bytes`, and read whole or row
by row. The file is read with preadv, not mapped: mapped pages count towards the process's resident size, which
`--memory` bounds, and the page cache does not. The file is unlinked at once: it vanishes with the process.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.cache.native import read_rows
from longspec.cache.stage import BLOCK, Room, Shape
from longspec.errors import LongspecError

__all__ = ["FileStore"]


class FileStore:
    """Blocks in an unnamed file in `folder` (the system's folder for temporary files, if not given)."""

    def __init__(self, shape: Shape, folder: Path | None = None) -> None:
        self._kind = shape
        self._shape = (shape.key_heads, BLOCK, 2, shape.head_dim)
        self._row_bytes = 2 * shape.head_dim * shape.dtype.itemsize
        self._block_bytes = shape.key_heads * BLOCK * self._row_bytes
        self._folder = folder
        self._file, name = tempfile.mkstemp(prefix="longspec-", dir=folder)
        os.unlink(name)
        weakref.finalize(self, os.close, self._file)

    @property
    def nbytes(self) -> int:
        return os.fstat(self._file).st_size

    def write(self, layer: int, block: int, rows: Tensor) -> None:
        held: Any = rows.to("cpu").permute(1, 2, 0, 3).contiguous().view(torch.uint8).flatten().numpy()
        try:
            written = os.pwrite(self._file, memoryview(held), self._at(layer, block))
        except OSError as error:
            raise LongspecError(
                f"The cache on disk can't grow: {error.strerror}; free room or name another TMPDIR."
            ) from error
        if written != self._block_bytes:
            raise LongspecError("The cache on disk can't grow: the disk is full; name another TMPDIR.")

    def read(self, layer: int, block: int) -> Tensor:
        rows = torch.empty(self._block_bytes, dtype=torch.uint8)
        into: Any = rows.numpy()
        got = os.preadv(self._file, [memoryview(into)], self._at(layer, block))
        if got != self._block_bytes:
            raise LongspecError(f"The cache on disk lost a block: {got} of {self._block_bytes} bytes were read.")
        return rows.view(self._kind.dtype).view(self._shape).permute(2, 0, 1, 3)

    def gather(self, layer: int, heads: Any, positions: Any, to: Any, places: Any) -> None:
        place = heads * BLOCK + positions % BLOCK
        got = read_rows(self._file, self._at(layer, positions // BLOCK) + place * self._row_bytes, to, places)
        if got != len(places):
            raise LongspecError(f"The cache on disk lost rows: {got} of {len(places)} were read.")

    def tensors(self) -> Iterator[Tensor]:
        """None: the blocks are in the file."""
        return iter(())

    def fork(self) -> FileStore:
        """A copy of the file, since both sequences write their own blocks from here on."""
        twin, at = FileStore(self._kind, self._folder), 0
        while piece := os.pread(self._file, 1 << 24, at):
            os.pwrite(twin._file, piece, at)
            at += len(piece)
        return twin

    def room(self, nbytes: int) -> Room:
        return Room(0, disk=nbytes)

    def _at(self, layer: int, block: Any) -> Any:
        return (block * self._kind.layers + layer) * self._block_bytes
