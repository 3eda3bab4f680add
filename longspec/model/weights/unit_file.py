"""A file of units: runs of whole pages, each with its sum, that are read into memory as they are asked for.

Takes a path and the units; gives a unit's bytes in a room that the caller has. Any number of threads may read. Knows no
tensor's meaning.

The file is read around the page cache where the file system can (O_DIRECT), which would hold the file a second time
and, beside a limit on memory, push itself out before it is of use: what is read is each time the disk's. (Of 400 MB it
takes .05 to .1 s of a processor; through the page cache .2 s.)
"""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from longspec.errors import ModelError
from longspec.machine.disk import open_direct

__all__ = ["Expert", "Key", "Unit", "UnitFile", "room_of"]

Expert = tuple[int, int]
"""A layer, and the number of one of its experts."""

Key = int | Expert
"""A unit: a layer's matrices, or one of its experts'."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of bytes of the file, of whole pages."""

    offset: int
    nbytes: int
    crc: int  # zlib's, of all of them


class UnitFile:
    """An open file of units."""

    def __init__(self, path: Path, units: Mapping[Key, Unit]) -> None:
        """Raises ModelError where the file can't be opened."""
        self.path, self.units = path, units
        self.nbytes_read = 0  # so far
        self._sound: set[Key] = set()  # units whose sum was compared
        self._counting = threading.Lock()
        try:
            self._file, self._direct = open_direct(path)
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror or error}.") from error

    def read(self, unit: Key, room: Tensor) -> None:
        """Read a unit into a room; the first time, hold it to its sum.

        Raises:
            ModelError: the file can't be read any more, has become shorter, or isn't what was written.
        """
        place, array = self.units[unit], cast(Any, room.numpy())
        view = memoryview(array)[: place.nbytes]
        done = 0
        try:
            while done < place.nbytes and (count := os.preadv(self._file, [view[done:]], place.offset + done)):
                done += count
            if not self._direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file, place.offset, place.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ModelError(f"{self.path} can't be read any more: {error.strerror or error}.") from error
        if done < place.nbytes:
            raise ModelError(
                f"{self.path} became shorter while the model ran: it has {os.fstat(self._file).st_size:,} bytes, and "
                f"weights up to {place.offset + place.nbytes:,} were wanted. Run it again: the file is made anew."
            )
        with self._counting:
            self.nbytes_read += done
        if unit not in self._sound:
            if zlib.crc32(view) != place.crc:
                raise ModelError(f"{self.path} isn't what was written there: remove it, and it is made anew.")
            self._sound.add(unit)

    def close(self) -> None:
        """Close the file; once."""
        with suppress(OSError):
            os.close(self._file)


def room_of(nbytes: int, *, large: bool) -> tuple[mmap.mmap, Tensor]:
    """Memory that begins at a page and has none yet, and its bytes. large: in large pages, if the system has them."""
    room = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large:
        room.madvise(mmap.MADV_HUGEPAGE)
    return room, torch.frombuffer(room, dtype=torch.uint8)
