"""How long a batch will take: the scheduler, run over the lengths of requests instead of the requests.

Takes lengths, arrival times, and the seconds of passes that a run has measured; gives seconds, rates and waiting times.
It is `longspec.engine.scheduler` without texts: at most `width` of them in a pass, one prompt at a time beside them,
chunk by chunk, and a new one as soon as another has ended. Between two such events all passes are alike, so that their
time is one product: 10^7 requests take a quarter of a minute.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np

from longspec.batch.passes import PassTimes
from longspec.errors import UsageError

__all__ = ["Forecast", "Lengths", "simulate"]

_CHUNK = 512
_STEP = 64
_MOST = 10_000_000
"""Requests of a simulation; and tokens of a request, which no context holds."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Requests: tokens of prompts (those that are read) and of answers, and seconds of arrival, rising; all int or
    float [n].
    """

    prompts: np.ndarray
    answers: np.ndarray
    arrivals: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Lengths:
        """Of lines of JSON: those that `longspec batch` has written, or objects with `prompt_tokens` and
        `completion_tokens`, and with `arrival` in seconds if they don't come all at once.

        Raises:
            UsageError: it can't be read, or has no such line.
        """
        try:
            with path.open("rb") as file:
                found = [one for number, line in enumerate(file, 1) if (one := _line(line, path, number)) is not None]
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror}; name a file of requests.") from error
        if not found:
            raise UsageError(f"{path} has no request; give the answers of a longspec batch, or lines of lengths.")
        table = np.array(sorted(found))
        return cls(table[:, 1].astype(np.int64), table[:, 2].astype(np.int64), table[:, 0] - table[0, 0])

    def drawn(self, count: int, every: int = 1, seed: int = 0) -> Lengths:
        """`count` requests like these: lengths drawn at random, arrivals each `every`-th of theirs, again and again."""
        if not 1 <= count <= _MOST:
            raise UsageError(f"{count:,} requests of one engine are too many to simulate; {_MOST:,} are the most.")
        here = np.random.default_rng(seed).integers(len(self.prompts), size=count)
        span = float(self.arrivals[-1]) * len(self.arrivals) / max(1, len(self.arrivals) - 1)
        turns, places = np.divmod(np.arange(count) * every, len(self.arrivals))
        return Lengths(self.prompts[here], self.answers[here], self.arrivals[places] + turns * span)


def _line(line: bytes, path: Path, number: int) -> tuple[float, int, int] | None:
    """Arrival, tokens to read and tokens to write; None of a blank line, or of a request that failed."""
    if not line.strip():
        return None
    try:
        said: Any = json.loads(line)
        if said.get("error") is not None:
            return None
        usage = said.get("usage", said)
        prompt, answer = (
            int(usage["prompt_tokens"]) - int(usage.get("cached_tokens", 0)),
            int(usage["completion_tokens"]),
        )
        arrival = float(said.get("arrival", 0.0))
        if not (0 <= prompt <= _MOST and 1 <= answer <= _MOST and 0 <= arrival < 1e12):
            raise ValueError("a number is out of range")
    except (ValueError, TypeError, KeyError, AttributeError) as wrong:
        raise UsageError(
            f"Line {number} of {path} is no request ({type(wrong).__name__}: {wrong}); it needs prompt_tokens and "
            "completion_tokens."
        ) from None
    return arrival, prompt, answer


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run is expected to take. idle: of the seconds, those without a request."""

    requests: int
    tokens: int
    seconds: float
    idle: float
    passes: int
    waiting: tuple[float, float]  # from a request's arrival to its end: median, and of one in a hundred

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def simulate(lengths: Lengths, times: PassTimes, *, width: int, tokens_per_step: float) -> Forecast:
    """One engine's run over these requests. width: texts in a pass; tokens_per_step: those that a text gets by one."""
    steps = _steps(lengths.answers, tokens_per_step)
    seconds = times.expected(width, _CHUNK // _STEP)
    read = np.maximum(lengths.prompts - 1, 0)
    whole, last = (read // _CHUNK).tolist(), (-(-(read % _CHUNK) // _STEP)).tolist()
    arrivals = lengths.arrivals.tolist()
    count, now, idle, turn, writing, coming = len(steps), 0.0, 0.0, 0, 0, 0
    ends: list[tuple[int, int]] = []  # the pass after which each text ends, and which it is
    chunks: Iterator[int] = iter(())
    chunk, reading = 0, -1  # blocks of the prompt in this pass, and whose it is
    waited = np.zeros(count)
    while True:
        if reading < 0 and coming < count and writing < width and arrivals[coming] <= now:
            reading, coming = coming, coming + 1
            chunks = _chunks(whole[reading], last[reading])
            chunk = next(chunks, 0)
            if not chunk:  # nothing to read: it is written from the start
                heappush(ends, (turn + steps[reading], reading))
                writing, reading = writing + 1, -1
                continue
        if not writing and reading < 0:
            if coming == count:
                break
            idle, now = idle + arrivals[coming] - now, arrivals[coming]
            continue
        one = seconds[writing][chunk if reading >= 0 else 0]
        alike = 1 if reading >= 0 else ends[0][0] - turn
        if reading < 0 and coming < count and writing < width:
            alike = min(alike, max(1, ceil((arrivals[coming] - now) / one)))
        now, turn = now + alike * one, turn + alike
        while ends and ends[0][0] <= turn:
            ended = heappop(ends)[1]
            waited[ended], writing = now - arrivals[ended], writing - 1
        if reading >= 0 and not (chunk := next(chunks, 0)):
            heappush(ends, (turn + steps[reading], reading))
            writing, reading = writing + 1, -1
    middle, late = np.quantile(waited, [0.5, 0.99]).tolist()
    return Forecast(count, int(lengths.answers.sum()), now, idle, turn, (middle, late))


def _steps(answers: np.ndarray, tokens_per_step: float) -> list[int]:
    """Steps of each text, whose sum is that of the fractions: what one is rounded by is carried to the next."""
    if not 1 <= tokens_per_step < inf:
        raise UsageError(f"{tokens_per_step} tokens per step are none; a step writes one at least.")
    sums = np.concatenate([[0], np.rint(np.cumsum(answers / tokens_per_step))]).astype(np.int64)
    steps: list[int] = np.maximum(np.diff(sums), 1).tolist()
    return steps


def _chunks(whole: int, last: int) -> Iterator[int]:
    """Blocks of each chunk of a prompt."""
    for _ in range(whole):
        yield _CHUNK // _STEP
    if last:
        yield last
