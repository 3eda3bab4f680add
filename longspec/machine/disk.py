"""The disk: how fast a file is read from it.

Takes a path; gives bytes per second, as whoever reads weights for each pass will find it. Knows no model.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from time import perf_counter

__all__ = ["open_direct", "read_rate"]

_PIECE = 16 << 20  # bytes, a small layer's
_MOST = 0.5  # seconds


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor for reading, and whether it reads around the page cache (O_DIRECT). Raises OSError."""
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):  # of a file system that lacks it
            return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False


def read_rate(path: Path) -> float | None:
    """Bytes per second of reading a file in order for half a second, around the page cache; None where it can't be
    read, or the page cache can't be left out.
    """
    try:
        file, is_direct = open_direct(path)
    except OSError:
        return None
    done, room = 0, mmap.mmap(-1, _PIECE)
    try:
        began = perf_counter()
        while is_direct and (count := os.preadv(file, [room], done)) > 0 and perf_counter() - began < _MOST:
            done += count
        seconds = perf_counter() - began
    except OSError:
        return None
    finally:
        os.close(file)
    return done / seconds if done >= _PIECE else None
