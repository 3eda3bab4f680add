"""The loop around a batch's job: writes results, reports progress, and finishes in order on a signal."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from longspec.batch.records import Outcome, outcome
from longspec.cli.io import signals
from longspec.cli.io.progress import Progress
from longspec.errors import LongspecError

if TYPE_CHECKING:
    from longspec.batch.job import Job
    from longspec.batch.output import Output
    from longspec.batch.parts import Parts
    from longspec.batch.tally import Tally

__all__ = ["Loop", "Results"]

_DRAIN_SECONDS = 5.0
_DRAW_SECONDS = 0.2
_NOTE_SECONDS = 60.0


@dataclass(slots=True)
class Results:
    """Where results go. max_errors: stop after more failed lines than this. left: approximate number of remaining
    records, 0 if unknown.
    """

    out: Output | Parts
    tally: Tally
    progress: Progress
    max_errors: int | None
    left: int
    _drawn: float = field(default_factory=perf_counter)
    _noted: float = field(default_factory=perf_counter)

    def keep(self, outcome: Outcome) -> None:
        self.out.write(outcome.line)
        self.tally.add(outcome)

    def check_errors(self) -> None:
        if self.max_errors is not None and self.tally.failed > self.max_errors:
            raise LongspecError(
                f"{self.tally.failed:,} lines failed, and --max-errors is {self.max_errors:,}; {self.out.path} says "
                "why of each, and the same command goes on from there."
            )

    def show(self, tokens: int) -> None:
        """Draw the progress, or note it once a minute. tokens: committed so far."""
        now = perf_counter()
        if self.progress.drawn and now - self._drawn > _DRAW_SECONDS:
            self._drawn = now
            self.progress.report(self.tally.stage(tokens), self.tally.done, self.left)
        elif not self.progress.drawn and now - self._noted > _NOTE_SECONDS:
            self._noted = now
            self.progress.say(self.tally.stage(tokens))


class Loop:
    """The job of an engine in this process. openai: write lines in OpenAI's format."""

    def __init__(self, job: Job, results: Results, *, openai: bool) -> None:
        self.job = job
        self.results = results
        self.openai = openai

    @property
    def drafter(self) -> str:
        return self.job.engine.drafter_name

    def go(self) -> None:
        """Run the job. Raises Interrupted once the open sequences are finished, as far as possible."""
        whole = True  # False after an interrupted pass
        try:
            while self.job.admitting or self.job.running:
                for result in self.job.admit():
                    with signals.deferred():
                        self.results.keep(outcome(result, openai=self.openai))
                    self.results.check_errors()
                with signals.deferred():
                    whole = False
                    for result in self.job.step():
                        self.results.keep(outcome(result, openai=self.openai))
                    whole = True
                self.results.check_errors()
                self.results.show(self.job.tokens)
        except signals.Interrupted:
            if whole:
                signals.answer()
                self._drain()
            raise

    def report(self) -> dict[str, Any]:
        """What --summary says beside the tally's figures."""
        return {"width": self.job.width, "passes": self.job.times.report()}

    def _drain(self) -> None:
        """Finish the open sequences for a few seconds; another signal ends that at once."""
        end = perf_counter() + _DRAIN_SECONDS
        self.job.close()
        if self.job.running:
            self.results.progress.say(
                f"finishing {self.job.running} texts, for at most {_DRAIN_SECONDS:.0f} s; again to stop now"
            )
        while self.job.running and perf_counter() < end:
            for result in self.job.step():
                with signals.deferred():
                    self.results.keep(outcome(result, openai=self.openai))
