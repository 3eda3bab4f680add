"""Counts and times for Prometheus: what answers took, how long they were, what waits, and memory.

Takes finished answers; gives the text that a scraper reads. The format and its histograms are prometheus-client's.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from longspec.engine.answer import Answer
from longspec.machine.system import resident_bytes

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 200, 500)
_PER_STEP = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 16)


class Metrics:
    """Of one server. texts: how many are open; writing: how many of them are being written."""

    def __init__(self, texts: Callable[[], int], writing: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._answers = Counter("longspec_answers", "Answers ended.", ["finish_reason"], registry=registry)
        self._prompt = Counter("longspec_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter("longspec_cached_tokens", "Tokens of prompts that a cache had.", registry=registry)
        self._written = Counter("longspec_completion_tokens", "Tokens of answers.", registry=registry)
        self._drafted = Counter("longspec_drafted_tokens", "Tokens drafted.", registry=registry)
        self._accepted = Counter("longspec_accepted_tokens", "Drafted tokens that were kept.", registry=registry)
        self._first = Histogram(
            "longspec_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._rate = Histogram(
            "longspec_tokens_per_second", "Of an answer, after its first token.", buckets=_RATES, registry=registry
        )
        self._per_step = Histogram(
            "longspec_tokens_per_step", "Of an answer: 1 is plain decoding.", buckets=_PER_STEP, registry=registry
        )
        for name, said, value in (
            ("longspec_texts_open", "Texts being written or waiting.", texts),
            ("longspec_texts_read", "Those of them whose prompt has been read.", writing),
            ("longspec_resident_bytes", "Memory of the process.", resident_bytes),
        ):
            Gauge(name, said, registry=registry).set_function(value)

    def ended(self, answer: Answer) -> None:
        """An answer is complete."""
        usage, timing, speculation = answer.usage, answer.timing, answer.speculation
        self._answers.labels(answer.finish_reason).inc()
        self._prompt.inc(usage["prompt_tokens"])
        self._cached.inc(usage["cached_tokens"])
        self._written.inc(usage["completion_tokens"])
        self._drafted.inc(speculation["drafted"])
        self._accepted.inc(speculation["accepted"])
        if (first := timing["time_to_first_token_s"]) is not None:
            self._first.observe(first)
        if (rate := timing["tokens_per_second"]) is not None:
            self._rate.observe(rate)
        if speculation["steps"]:
            self._per_step.observe(speculation["tokens_per_step"])

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)
