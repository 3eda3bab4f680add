"""A ring of buffers that a thread fills from a file, ahead of whoever uses what is in them.

Takes a file of units (a layer's matrices each, in the layout that products read) and gives each unit's bytes, in place,
between `take` and `give_back`. Knows no tensor's meaning.

A unit has one place: units share the buffers in turns, so that views of a buffer are made once, and mean what they say
while their unit is held. After a unit the reader goes on with the one that followed it the last time, at first with
the next: the first units of the next pass are so read while the last of this one are used, and a pass that leaves
units out (a prompt's, which needs no head) is read ahead for as well.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from torch import Tensor

from longspec.errors import ModelError
from longspec.machine.system import has_large_pages
from longspec.model.weights.unit_file import UnitFile, room_of

__all__ = ["Ring"]


class Ring:
    """Units of a file, of which those in `kept` are read once and stay; the others share `buffers` buffers."""

    def __init__(self, file: UnitFile, units: Sequence[int], kept: Sequence[int], buffers: int) -> None:
        """units: those of the file that it is for, in the order of their first use. Raises ModelError where a kept unit
        can't be read.
        """
        self.file, self.waited = file, 0.0  # seconds that `held` waited so far
        large, sizes = has_large_pages(), {unit: file.units[unit].nbytes for unit in units}
        self._kept = {unit: room_of(sizes[unit], large=large)[1] for unit in kept}
        streamed = [unit for unit in units if unit not in self._kept]
        largest = max((sizes[unit] for unit in streamed), default=0)
        self._buffers = [room_of(largest, large=large)[1] for _ in range(min(buffers, len(streamed)))]
        self._buffer_of = {unit: i % len(self._buffers) for i, unit in enumerate(streamed)}
        self._holds: list[int | None] = [None] * len(self._buffers)  # the unit that was read into each
        self._spent = [True] * len(self._buffers)  # it was used, and may be read over
        self._after = dict(zip(streamed, streamed[1:] + streamed[:1], strict=True))
        self._used: int | None = None  # the unit in use, or the last one that was
        self._busy = False  # it is in use
        self._wanted: int | None = None  # the unit that `take` waits for
        self._latest: int | None = None  # the unit that was read last, or is being read
        self._error: ModelError | None = None
        self._closed = False
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None
        for unit, room in self._kept.items():
            file.read(unit, room)

    @property
    def streamed(self) -> int:
        """Bytes of all units that don't stay."""
        return sum(self.file.units[unit].nbytes for unit in self._buffer_of)

    @property
    def nbytes(self) -> int:
        """Bytes of memory: kept units and buffers."""
        return sum(len(room) for room in (*self._kept.values(), *self._buffers))

    def room(self, unit: int) -> Tensor:
        """The bytes where a unit stands while it is held."""
        held = self._kept.get(unit)
        return (self._buffers[self._buffer_of[unit]] if held is None else held)[: self.file.units[unit].nbytes]

    def parts(self, unit: int) -> bool:
        """Whether it, or the one before it, is read while others are used."""
        return unit in self._buffer_of or unit - 1 in self._buffer_of

    @contextmanager
    def held(self, unit: int) -> Iterator[None]:
        """The unit's bytes stand in its room. One unit is held at a time.

        Raises:
            ModelError: the file can't be read any more, has become shorter, or isn't what was written.
        """
        if unit in self._kept:
            yield
            return
        self._take(unit)
        try:
            yield
        finally:
            with self._turn:
                self._spent[self._buffer_of[unit]], self._busy = True, False
                self._turn.notify_all()

    def close(self) -> None:
        """End the thread and close the file."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            self._turn.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.file.close()

    def _take(self, unit: int) -> None:
        buffer = self._buffer_of[unit]
        with self._turn:
            if self._thread is None:
                self._thread = threading.Thread(target=self._read_on, name="longspec-weights", daemon=True)
                self._thread.start()
            if self._used not in (None, unit):
                self._after[self._used] = unit
            began = perf_counter()
            if self._holds[buffer] != unit and self._latest != unit:  # what was read ahead was for another pass
                self._spent = [True] * len(self._buffers)
            while self._holds[buffer] != unit and self._error is None:
                self._wanted = unit
                self._turn.notify_all()
                self._turn.wait()
            self._wanted = None
            self.waited += perf_counter() - began
            error, self._error = self._error, None
            if error is not None:
                raise error
            self._used, self._busy, self._spent[buffer] = unit, True, False
            self._turn.notify_all()

    def _read_on(self) -> None:
        """The thread: reads one unit after the other."""
        while True:
            with self._turn:
                while (unit := self._next()) is None and not self._closed:
                    self._turn.wait()
                if self._closed or unit is None:
                    return
                self._latest, buffer = unit, self._buffer_of[unit]
                self._holds[buffer] = None
            error = None
            try:
                self.file.read(unit, self._buffers[buffer])
            except ModelError as found:
                error = found
            with self._turn:
                if error is None:
                    self._holds[buffer], self._spent[buffer] = unit, False
                else:  # for the next who asks; then the file is tried again
                    self._error, self._latest, self._spent[buffer] = error, None, True
                self._turn.notify_all()

    def _next(self) -> int | None:
        """The unit to read now: the one that is waited for, else the one that will follow, once its place is free."""
        if self._wanted is not None and self._holds[self._buffer_of[self._wanted]] != self._wanted:
            return self._wanted
        if self._latest is None:
            return None
        unit = self._after[self._latest]
        buffer = self._buffer_of[unit]
        if self._holds[buffer] == unit:  # as it was left: it needs no reading
            is_free = self._spent[buffer] and not (self._busy and self._used == unit)
            if is_free:
                self._spent[buffer], self._latest = False, unit
                return self._next()
            return None
        return unit if self._spent[buffer] else None
