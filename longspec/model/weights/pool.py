"""Experts that are read when rows choose them: those that are chosen most stay in memory.

Takes a file of units and a bound of bytes; gives each expert's bytes in a room of its own, for as long as it stands
there. Knows no tensor's meaning.

A room is a range of addresses that has memory while its expert is held: views of it are made once, and who leaves
gives the memory back to the system. While a layer's experts are awaited and used, those are read that the next layer's
router would choose for the same rows, which are mostly those that it will (2312.17238). An expert's worth is how often
it was chosen, lately more than long ago; where there is no room for another, the one of the least worth leaves.
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
_RIGHT = 0.6  # share of guesses that must have been right for the next to be read
_FEW = 8  # rows whose next experts are read ahead: of more, the next layer wants nearly all


class Pool:
    """The experts of all layers, of which at most so many bytes are in memory, and at least what one call needs."""

    def __init__(self, file: UnitFile, most: int) -> None:
        self.file, self.most = file, most
        self.held_bytes = 0
        self.chosen = self.missed = 0  # experts that passes of a layer chose so far, and those of them that were read
        self._rooms: dict[Expert, tuple[mmap.mmap, Tensor]] = {}
        self._held: dict[Expert, Future[None]] = {}  # and its reading
        self.routes: dict[int, Callable[[Tensor], tuple[Tensor, Tensor]]] = {}  # by layer
        self.right = _RIGHT  # the share of guesses that were chosen, lately
        self._guesses: dict[int, Sequence[Expert]] = {}
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
                left = self.most * 3 // 8  # the rest is for what was foreseen and isn't wanted
            made[-1].append(unit)
            left -= nbytes
        return [*made]

    def choose(self, units: Sequence[Expert]) -> None:
        """Note that a pass's rows have chosen these, which are of one layer."""
        guess = self._guesses.pop(units[0][0], ()) if units else ()
        if guess:
            self.right += (sum(unit in units for unit in guess) / len(guess) - self.right) / 16
        self._now *= _AGING
        self.chosen += len(units)
        for unit in units:
            self._worth[unit] += self._now
        if self._now > _LARGEST:
            self._worth = defaultdict(float, {unit: worth / self._now for unit, worth in self._worth.items()})
            self._now = 1.0

    def bring(self, units: Collection[Expert], beside: Collection[Expert] = ()) -> Callable[[], None]:
        """Begin to read those that aren't there; what is given waits until they are. beside: those that stay."""
        self.missed += sum(unit not in self._held for unit in units)
        self._read(units, {*units, *beside})

        def wait() -> None:
            failed = [(unit, error) for unit in units if (error := self._held[unit].exception()) is not None]
            for unit, _ in failed:
                self._leave(unit)
            if failed:
                raise failed[0][1]

        return wait

    def foresee(self, layer: int, rows: Tensor, beside: Collection[Expert]) -> None:
        """Begin to read the experts that the next layer's router would choose for these rows of this one, if they are
        few. beside: those that stay.
        """
        route = self.routes.get(layer + 1)
        if route is None or len(rows) > _FEW:
            return
        guess = [(layer + 1, expert) for expert in sorted(set(route(rows)[0].flatten().tolist()))]
        guess = [unit for unit in guess if unit in self.file.units]
        wanted = sum(self.file.units[unit].nbytes for unit in guess if unit not in self._held)
        self._guesses[layer + 1] = guess
        if self.right < _RIGHT or wanted > self.most // 4:
            return
        self._make_room(wanted, staying := {*guess, *beside})
        if self.held_bytes + wanted <= self.most:
            self._read(guess, staying)

    def bring_layer(self, layer: int) -> None:
        """Read all of a layer's experts, whatever the bound: for a look at all weights."""
        self.bring([unit for unit in self._rooms if unit[0] == layer])()

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(cancel_futures=True)

    def _read(self, units: Collection[Expert], staying: Collection[Expert]) -> None:
        """Begin to read those that aren't there."""
        missing = [unit for unit in units if unit not in self._held]
        self._make_room(sum(self.file.units[unit].nbytes for unit in missing), staying)
        for unit in missing:
            self.held_bytes += self.file.units[unit].nbytes
            self._held[unit] = self._readers.submit(self.file.read, unit, self.room(unit))

    def _make_room(self, nbytes: int, staying: Collection[Expert]) -> None:
        excess = self.held_bytes + nbytes - self.most
        if excess <= 0:
            return
        leaving = [unit for unit, reading in self._held.items() if unit not in staying and reading.done()]
        for unit in sorted(leaving, key=lambda unit: self._worth[unit]):
            if excess <= 0:
                return
            excess -= self.file.units[unit].nbytes
            self._leave(unit)

    def _leave(self, unit: Expert) -> None:
        del self._held[unit]
        self.held_bytes -= self.file.units[unit].nbytes
        self._rooms[unit][0].madvise(mmap.MADV_DONTNEED)


class Pooled:
    """The products of one layer's experts, which come from a pool; as `Moe.multiply`."""

    def __init__(self, multiply: Callable[[Tensor, Sequence[int]], Tensor], pool: Pool, layer: int) -> None:
        self._multiply, self._pool, self._layer = multiply, pool, layer
        self._rows: Tensor | None = None  # of the pass, as the router took them

    def routed(self, rows: Tensor) -> None:
        """Say what rows the layer's router has taken for the call that follows."""
        self._rows = rows

    def routed_by(self, route: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """Say by what the layer's experts are chosen."""
        self._pool.routes[self._layer] = route

    def __call__(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        pool, units = self._pool, [(self._layer, i) for i in range(len(counts))]
        chosen = [unit for unit, count in zip(units, counts, strict=True) if count and unit in pool.file.units]
        pool.choose(chosen)
        groups = pool.groups(chosen)
        if len(groups) < 2:
            wait = pool.bring(chosen)
            if self._rows is not None:
                pool.foresee(self._layer, self._rows, chosen)
            wait()
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
