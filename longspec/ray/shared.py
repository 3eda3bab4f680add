"""One engine for the calls of several threads: all their records in shared passes, to each call its own results.

Ray Data calls an actor with a few records at a time. If a call ran its own passes, the last text of each would be
written alone; here the records of all calls stand in one queue, and one thread writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from longspec.batch.job import Job, Result

if TYPE_CHECKING:
    from longspec.batch.requests import Fault, Item
    from longspec.engine.engine import Engine
    from longspec.engine.options import Options

__all__ = ["Shared"]

_Call = tuple["Item | Fault", "Future[Result]"]


class Shared:
    """The records of all calls of a process. defaults: options of all records. width: texts in a pass."""

    def __init__(self, engine: Engine, defaults: Options, width: int | None = None) -> None:
        self._job = Job(engine, iter(()), defaults, width)
        self._coming: SimpleQueue[_Call] = SimpleQueue()
        self._waiting: dict[int, list[Future[Result]]] = {}  # by a record's index; the writing thread's alone
        self._failed: BaseException | None = None
        Thread(target=self._run, name="longspec", daemon=True).start()

    @property
    def width(self) -> int:
        return self._job.width

    def write(self, records: Sequence[Item | Fault]) -> list[Result]:
        """The results of these records, in their order; blocks until the last one is there. Any thread may call it."""
        futures: list[Future[Result]] = [Future() for _ in records]
        for call in zip(records, futures, strict=True):
            self._coming.put(call)
        if self._failed is not None:
            raise self._failed
        return [future.result() for future in futures]

    def _run(self) -> None:
        try:
            while True:
                self._admit()
                for result in self._job.step():
                    self._tell(result)
        except BaseException as error:  # noqa: BLE001  the calls that wait have it: none may hang
            self._failed = error
            for future in [future for waiting in self._waiting.values() for future in waiting]:
                future.set_exception(error)
            while True:
                self._coming.get()[1].set_exception(error)

    def _admit(self) -> None:
        """Begin what came, as far as the pass has room; waits where there is nothing to write."""
        while self._job.wants:
            try:
                record, future = self._coming.get(block=not self._job.running)
            except Empty:
                return
            # A record that is under way already (Ray asks again for what it lost) is written once, for both calls.
            self._waiting.setdefault(record.index, []).append(future)
            if len(self._waiting[record.index]) == 1:
                for result in self._job.begin(record):
                    self._tell(result)

    def _tell(self, result: Result) -> None:
        for future in self._waiting.pop(result.index):
            future.set_result(result)
