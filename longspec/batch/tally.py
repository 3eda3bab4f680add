"""The statistics of a batch run: for the progress bar, for the closing line, and for --summary."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from longspec.batch.records import Outcome
from longspec.types import Stats

__all__ = ["Tally"]


@dataclass(slots=True)
class Tally:
    """finished, failed_before: the output's lines at the start, and the number of errors among them."""

    finished: int
    failed_before: int
    began: float = field(default_factory=perf_counter)
    written: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    stats: Stats = field(default_factory=Stats)

    def add(self, outcome: Outcome) -> None:
        if outcome.stats is None:
            self.failed += 1
            return
        self.written += 1
        self.prompt_tokens += outcome.prompt_tokens
        self.stats += outcome.stats

    @property
    def done(self) -> int:
        return self.written + self.failed

    def stage(self, tokens: int) -> str:
        """The progress line; tokens: committed so far, those of unfinished sequences included."""
        sentence = f"{self.done + self.finished:,} done"
        sentence += f", {failed:,} failed" if (failed := self.failed + self.failed_before) else ""
        sentence += f", {tokens / max(1e-9, perf_counter() - self.began):,.0f} tokens/s"
        return sentence + (f", acceptance {self.stats.acceptance:.2f}" if self.stats.drafted else "")

    def sentence(self, drafter: str) -> str:
        """The closing line."""
        seconds, stats = perf_counter() - self.began, self.stats
        text = f"{self.written:,} written, {self.failed:,} failed"
        text += f", {self.finished:,} there before" if self.finished else ""
        text += f"; {stats.committed:,} tokens in {seconds:.1f} s ({stats.committed / max(1e-9, seconds):.1f} tokens/s)"
        text += f", {stats.tokens_per_step:.2f} tokens per step with {drafter}" if stats.steps else ""
        return text + (f", acceptance {stats.acceptance:.2f}" if stats.drafted else "")

    def report(self, drafter: str) -> dict[str, Any]:
        """The object that --summary writes."""
        seconds, stats = perf_counter() - self.began, self.stats
        return {
            "written": self.written,
            "failed": self.failed,
            "finished_before": self.finished,
            "failed_before": self.failed_before,
            "seconds": seconds,
            "tokens_per_second": stats.committed / seconds if seconds > 0 else None,
            "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": stats.committed},
            "speculation": {
                "drafter": drafter,
                "steps": stats.steps,
                "drafted": stats.drafted,
                "accepted": stats.accepted,
                "acceptance": stats.acceptance if stats.drafted else None,
                "tokens_per_step": stats.tokens_per_step,
                "steps_without_a_bet": stats.steps_without_a_bet,
            },
        }
