"""The loop around a batch on a cluster: takes what its engines send back, writes each answer once, reports progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from longspec.batch.tally import Tally
from longspec.cli.io import signals
from longspec.errors import LongspecError

if TYPE_CHECKING:
    from longspec.batch.marks import Marks
    from longspec.cli.io.batch_loop import Results
    from longspec.ray.actor import Report

__all__ = ["ClusterLoop"]

Begin = Callable[[Mapping[str, str]], None]


class ClusterLoop:
    """The reports of a cluster's actors. begin: called with the identity of the first engine, before its first line is
    written. written: the records in the output, to which those of this run are added.
    """

    def __init__(self, reports: Iterable[Report], results: Results, written: Marks, begin: Begin) -> None:
        self.results = results
        self.drafter = "none"
        self._reports = reports
        self._written = written
        self._begin = begin
        self._first: Report | None = None
        self._actors: dict[str, Tally] = {}

    def go(self) -> None:
        """Take all reports. A group that Ray gave out twice is written once."""
        for report in self._reports:
            signals.check()
            self._check(report)
            with signals.deferred():
                for outcome in report.outcomes:
                    if self._written.add(outcome.mark):
                        self.results.keep(outcome)
                        self._actors[report.actor].add(outcome)
            self.results.check_errors()
            self.results.show(self.results.tally.stats.committed)

    def report(self) -> dict[str, Any]:
        """The figures of each actor, for --summary."""
        return {"actors": {name: tally.report(self.drafter) for name, tally in self._actors.items()}}

    def _check(self, report: Report) -> None:
        """Raise an actor's error, and refuse one whose texts would be another model's."""
        if report.error is not None:
            raise report.error
        if self._first is None:
            self._begin(report.identity)
            self._first, self.drafter = report, report.drafter
        if report.actor not in self._actors:
            _refuse_others(self._first, report)
            self._actors[report.actor] = Tally(0, 0, began=perf_counter() - report.seconds)


def _refuse_others(first: Report, other: Report) -> None:
    for name, value in first.identity.items():
        if other.identity.get(name) != value:
            shown = "" if name in ("weights", "tokenizer") else f" ({value} and {other.identity.get(name)})"
            what = "give --dtype, so that all have the same" if name == "dtype" else "give every node the same"
            raise LongspecError(
                f"The engines on {first.actor} and {other.actor} differ in their {name}{shown}; {what}."
            )
