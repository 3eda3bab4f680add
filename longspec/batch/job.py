"""The running sequences of a batch: records in, results out, at most `width` sequences in a pass.

Takes an engine and a stream of records; knows no file, no line and no signal. `admit` reads and opens, `step` runs
one pass. A record that fails is a result too, whatever its error (`longspec.engine.scheduler` attributes errors to
sequences): its line is in the output, so that a second run doesn't try it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING

from longspec.batch.passes import PassTimes
from longspec.batch.records import Written
from longspec.batch.requests import Fault, Item, over
from longspec.engine.scheduler import WIDTH, Schedule
from longspec.errors import BudgetError, ContextError, LongspecError, UsageError, reported

if TYPE_CHECKING:
    from longspec.engine.engine import Engine
    from longspec.engine.options import Options
    from longspec.engine.session import Session

__all__ = ["Job", "Result"]

Result = Written | Fault

AHEAD = 4
"""In order, so many times the texts of a pass may be finished, and wait in memory, behind one that is not."""


class Job:
    """A batch in progress. defaults: options of all records, overridden by a record's own. in_order: results in the
    order of the records.
    """

    def __init__(
        self,
        engine: Engine,
        records: Iterator[Item | Fault],
        defaults: Options,
        width: int | None = None,
        *,
        in_order: bool = False,
    ) -> None:
        self.engine = engine
        self.defaults = defaults
        self.width = width or WIDTH
        self.admitting = True
        self.tokens = 0  # tokens committed so far
        self.times = PassTimes()
        self._ended: float | None = None  # the last pass, if texts were left to write
        self._records = records
        self._schedule = Schedule(engine, self.width)
        self._running: dict[Session, Item] = {}
        self._order = _Order() if in_order else None

    @property
    def running(self) -> int:
        """The number of open sequences."""
        return len(self._running)

    def admit(self) -> Iterator[Result]:
        """Open as many sequences as may begin, and yield the results of those that can't be opened."""
        while self.admitting and self.wants:
            record = next(self._records, None)
            if record is None:
                self.admitting = False
                return
            yield from self.begin(record)

    @property
    def wants(self) -> bool:
        """Whether another record may begin."""
        return self._schedule.wants > 0 and self._has_room

    def begin(self, record: Item | Fault) -> list[Result]:
        """Open a record's sequence; returns the result of one that can't be opened."""
        if self._order is not None:
            self._order.expect(record.index)
        return self._done(record) if isinstance(record, Fault) else self._open(record)

    def step(self) -> list[Result]:
        """Run one forward pass, and return the results of the sequences that ended."""
        results: list[Result] = []
        began, read = self._ended or perf_counter(), self._schedule.prefilled
        events = self._schedule.step()
        self._ended = perf_counter()
        if events or self._schedule.prefilled > read:
            self.times.add(len(events), self._schedule.prefilled - read, self._ended - began)
        for session, event in events:
            if isinstance(event, LongspecError):
                results += self._done(_fault(self._running.pop(session), event))
                continue
            self.tokens += len(event.tokens)
            if event.finish_reason is not None:
                item = self._running.pop(session)
                results += self._done(Written(item, self.engine.answer(session), session.stats))
        if not self._running:
            self._ended = None
        return results

    def close(self) -> None:
        """Open no further sequence; the open ones may be finished by further steps."""
        self.admitting = False
        for session in [session for session in self._running if not session.cache.length and not session.answer]:
            self._schedule.drop(session)
            del self._running[session]

    @property
    def _has_room(self) -> bool:
        return self._order is None or len(self._order) < AHEAD * self.width

    def _open(self, item: Item) -> list[Result]:
        try:
            session = self._schedule.begin(item.prompt, over(self.defaults, item))
        except Exception as error:  # noqa: BLE001  as in the schedule: no record may end the batch
            session = reported(error)
        if isinstance(session, LongspecError):
            return self._done(_fault(item, session))
        self._running[session] = item
        return []

    def _done(self, result: Result) -> list[Result]:
        return [result] if self._order is None else self._order.put(result)


class _Order:
    """Holds results back until all earlier ones are there."""

    def __init__(self) -> None:
        self._expected: deque[int] = deque()
        self._held: dict[int, Result] = {}

    def __len__(self) -> int:
        return len(self._expected)

    def expect(self, index: int) -> None:
        self._expected.append(index)

    def put(self, result: Result) -> list[Result]:
        """The results that may be released now."""
        self._held[result.index] = result
        leaving = []
        while self._expected and self._expected[0] in self._held:
            leaving.append(self._held.pop(self._expected.popleft()))
        return leaving


def _fault(item: Item, error: LongspecError) -> Fault:
    codes = {ContextError: "context_length", UsageError: "invalid_request", BudgetError: "memory"}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), "failed")
    said = " ".join(str(error).split()) or type(error).__name__
    return Fault(item.index, item.id, said if len(said) <= 1000 else f"{said[:997]}...", code)
