"""The loop around a batch's job: writes results, reports progress, and finishes in order on a signal."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from longspec.batch.output import Output
from longspec.batch.records import line
from longspec.cli.io import signals
from longspec.cli.io.progress import Progress
from longspec.errors import LongspecError

if TYPE_CHECKING:
    from longspec.batch.job import Job, Result
    from longspec.batch.tally import Tally

__all__ = ["Loop"]

_DRAIN_SECONDS = 5.0
_DRAW_SECONDS = 0.2
_NOTE_SECONDS = 60.0


class Loop:
    """max_errors: stop after more failed lines than this. left: approximate number of remaining records, 0 if
    unknown. openai: write lines in OpenAI's format.
    """

    def __init__(
        self,
        job: Job,
        out: Output,
        tally: Tally,
        progress: Progress,
        max_errors: int | None,
        left: int,
        *,
        openai: bool,
    ) -> None:
        self.job = job
        self.out = out
        self.tally = tally
        self.progress = progress
        self.max_errors = max_errors
        self.left = left
        self.openai = openai
        self._drawn = self._noted = perf_counter()

    def go(self) -> None:
        """Run the job. Raises Interrupted once the open sequences are finished, as far as possible."""
        whole = True  # False after an interrupted pass
        try:
            while self.job.admitting or self.job.running:
                for result in self.job.admit():
                    self._write(result)
                    self._check_errors()
                with signals.deferred():
                    whole = False
                    for result in self.job.step():
                        self._keep(result)
                    whole = True
                self._check_errors()
                self._show()
        except signals.Interrupted:
            if whole:
                signals.answer()
                self._drain()
            raise

    def _drain(self) -> None:
        """Finish the open sequences for a few seconds; another signal ends that at once."""
        end = perf_counter() + _DRAIN_SECONDS
        self.job.close()
        if self.job.running:
            self.progress.say(
                f"finishing {self.job.running} texts, for at most {_DRAIN_SECONDS:.0f} s; again to stop now"
            )
        while self.job.running and perf_counter() < end:
            for result in self.job.step():
                self._write(result)

    def _write(self, result: Result) -> None:
        with signals.deferred():
            self._keep(result)

    def _keep(self, result: Result) -> None:
        self.out.write(line(result, openai=self.openai))
        self.tally.add(result)

    def _check_errors(self) -> None:
        if self.max_errors is not None and self.tally.failed > self.max_errors:
            raise LongspecError(
                f"{self.tally.failed:,} lines failed, and --max-errors is {self.max_errors:,}; {self.out.path} says "
                "why of each, and the same command goes on from there."
            )

    def _show(self) -> None:
        now = perf_counter()
        if self.progress.drawn and now - self._drawn > _DRAW_SECONDS:
            self._drawn = now
            self.progress.report(self.tally.stage(self.job.tokens), self.tally.done, self.left)
        elif not self.progress.drawn and now - self._noted > _NOTE_SECONDS:
            self._noted = now
            self.progress.say(self.tally.stage(self.job.tokens))
