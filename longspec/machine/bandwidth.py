"""The memory: how many bytes a second this process's threads read from it, or a GPU from its own.

It is measured for a third of a second; a CPU's once for each machine and number of threads, and kept in the user's
cache: a forecast shouldn't change from call to call. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import platform
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from longspec.errors import UsageError
from longspec.machine.files import read_json, replaced
from longspec.machine.system import available_bytes, cache_folder, processor

if TYPE_CHECKING:
    from torch import Tensor, device

__all__ = ["kept_rate", "memory_rate"]

_NBYTES = 256 << 20  # more than caches hold
_PARTS = 4
"""Each of which is read in some milliseconds, of which other processes often leave all: the best of them counts."""

_SECONDS = 0.3
_MOST_NBYTES = 1 << 16  # of the file
_FASTEST = 1e14  # bytes per second that no memory has


def memory_rate(of: device | None = None) -> float | None:
    """Bytes per second of reading, measured now; None where there is no room to measure in. of: a GPU, or the CPU,
    whose rate is kept.
    """
    import torch  # takes a second, and the command's start has no need of it

    if of is not None and of.type != "cpu":
        return _best(torch.ones(_NBYTES // 2, device=of), 1)  # in one call, as a launch takes some of its time
    if available_bytes() < 4 * _NBYTES:
        return None
    with mmap.mmap(-1, _NBYTES) as room:
        values = torch.frombuffer(room, dtype=torch.float32)
        values.fill_(1.0)  # a page that nobody wrote to is one page for all
        best = _best(values, _PARTS)
        del values  # the room can't be closed before
    path = _path(torch.get_num_threads())
    with suppress(OSError):  # without the file it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced(path, lambda place: place.write_text(json.dumps({"bytes_per_second": round(best)}), encoding="ascii"))
    return best


def _best(values: Tensor, parts: int) -> float:
    """Of reading so many parts one after the other, so that no cache holds the next one."""
    best, began = 0.0, perf_counter()
    while perf_counter() - began < _SECONDS:
        for part in values.chunk(parts):
            start = perf_counter()
            part.sum().item()
            best = max(best, part.nbytes / (perf_counter() - start))
    return best


def kept_rate() -> float | None:
    """What was measured before on this machine, else now."""
    import torch

    try:
        found = read_json(_path(torch.get_num_threads()), _MOST_NBYTES, "The memory's rate").get("bytes_per_second")
    except UsageError:
        return memory_rate()
    if isinstance(found, int | float) and 0 < found < _FASTEST:
        return float(found)
    return memory_rate()


def _path(threads: int) -> Path:
    what = json.dumps([platform.node(), processor(), threads])
    return cache_folder() / "bandwidth" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"
