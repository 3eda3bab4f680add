"""Experts that are read when rows choose them: those that are chosen most stay in memory.

Takes a file of units and a bound of bytes; gives each expert's bytes in a room of its own, for as long as it stands
there. Knows no tensor's meaning.

A room is a range of addresses that has memory while its expert is held: views of it are made once, and who leaves
gives the memory back to the system. An expert's worth is how often it was chosen, lately more than long ago; where
there is no room for another, the one of the least worth leaves.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate

import torch
from torch import Tensor

from longspec.model.weights.unit_file import Expert, UnitFile, room_of

__all__ = ["Pool"]

_READERS = 4
"""Threads: an expert is a few megabytes, and a disk wants several reads at once."""

_AGING = 1.02  # what a choice is worth more than one a pass of a layer earlier
_LARGEST = 1e100


class Pool:
    """The experts of all layers, of which at most so many bytes are in memory, and at least what one call needs."""

    def __init__(self, file: UnitFile, most: int) -> None:
        self.file, self.most = file, most
        self.held_bytes = 0
        self.chosen = self.missed = 0  # experts that passes of a layer chose so far, and those of them that were read
        self._rooms: dict[Expert, tuple[mmap.mmap, Tensor]] = {}
        self._held: set[Expert] = set()
        self._worth: dict[Expert, float] = defaultdict(float)
        self._now = 1.0
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="longspec-experts")

    def room(self, unit: Expert) -> Tensor:
        """The bytes where an expert stands while it is held."""
        if unit not in self._rooms:
            self._rooms[unit] = room_of(self.file.units[unit].nbytes, large=False)
        return self._rooms[unit][1]

    def groups(self, units: Sequence[Expert]) -> list[Sequence[Expert]]:
        """The units in runs, two of which fit in memory together: one is used while the next is read."""
        made: list[list[Expert]] = []
        left = 0
        for unit in units:
            nbytes = self.file.units[unit].nbytes
            if not made or nbytes > left:
                made.append([])
                left = self.most // 2
            made[-1].append(unit)
            left -= nbytes
        return [*made]

    def choose(self, units: Collection[Expert]) -> None:
        """Note that a pass's rows have chosen these."""
        self._now *= _AGING
        self.chosen += len(units)
        for unit in units:
            self._worth[unit] += self._now
        if self._now > _LARGEST:
            self._worth = defaultdict(float, {unit: worth / self._now for unit, worth in self._worth.items()})
            self._now = 1.0

    def bring(self, units: Collection[Expert], beside: Collection[Expert] = ()) -> Callable[[], None]:
        """Begin to read those that aren't there; what is given waits until they are. beside: those that stay."""
        missing = [unit for unit in units if unit not in self._held]
        self.missed += len(missing)
        self._make_room(sum(self.file.units[unit].nbytes for unit in missing), {*units, *beside})
        reading: list[tuple[Expert, Future[None]]] = []
        for unit in missing:
            self._held.add(unit)
            self.held_bytes += self.file.units[unit].nbytes
            reading.append((unit, self._readers.submit(self.file.read, unit, self.room(unit))))

        def wait() -> None:
            failed = [(unit, error) for unit, future in reading if (error := future.exception()) is not None]
            for unit, _ in failed:
                self._leave(unit)
            if failed:
                raise failed[0][1]

        return wait

    def bring_layer(self, layer: int) -> None:
        """Read all of a layer's experts, whatever the bound: for a look at all weights."""
        self.bring([unit for unit in self._rooms if unit[0] == layer])()

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(cancel_futures=True)

    def _make_room(self, nbytes: int, staying: Collection[Expert]) -> None:
        excess = self.held_bytes + nbytes - self.most
        if excess <= 0:
            return
        for unit in sorted(self._held.difference(staying), key=lambda unit: self._worth[unit]):
            if excess <= 0:
                return
            excess -= self.file.units[unit].nbytes
            self._leave(unit)

    def _leave(self, unit: Expert) -> None:
        self._held.discard(unit)
        self.held_bytes -= self.file.units[unit].nbytes
        self._rooms[unit][0].madvise(mmap.MADV_DONTNEED)


class Pooled:
    """The products of one layer's experts, which come from a pool; as `Moe.multiply`."""

    def __init__(self, multiply: Callable[[Tensor, Sequence[int]], Tensor], pool: Pool, layer: int) -> None:
        self._multiply, self._pool, self._layer = multiply, pool, layer

    def __call__(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        pool, units = self._pool, [(self._layer, i) for i in range(len(counts))]
        chosen = [unit for unit, count in zip(units, counts, strict=True) if count and unit in pool.file.units]
        pool.choose(chosen)
        groups = pool.groups(chosen)
        if len(groups) < 2:
            pool.bring(chosen)()
            return self._multiply(rows, counts)
        starts, made = [0, *accumulate(counts)], torch.empty_like(rows)
        firsts = [0, *(group[0][1] for group in groups[1:]), len(counts)]
        wait = pool.bring(groups[0])
        for i, group in enumerate(groups):
            wait()
            if i + 1 < len(groups):
                wait = pool.bring(groups[i + 1], group)
            first, last = firsts[i], firsts[i + 1]
            some = [count if first <= at < last else 0 for at, count in enumerate(counts)]
            own = slice(starts[first], starts[last])
            made[own] = self._multiply(rows[own], some)
        return made
