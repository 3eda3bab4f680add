"""Latency models, fitted online: a pass's seconds by its token positions and what they read, a draft's by its limit.

Takes measured seconds and gives expected ones; knows no clock, no model and no drafter. Where further positions read
further weights, as a mixture's do, what is learned is the seconds of reading what a pass of one position reads, and a
pass's seconds are these times its growth: what it reads, in passes of one position. So a text whose rows choose
other experts has its price at once, and what was learned on one text holds on another. The noise is one-sided (a
step may take ten times as long, never a tenth), so slow outliers get little weight.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import exp, log
from pathlib import Path
from typing import Any

from longspec.errors import UsageError
from longspec.machine.files import read_json, replaced
from longspec.machine.system import cache_folder

__all__ = ["Curve", "DraftCost", "costs_file", "read", "write"]

_KNOTS = 11
"""At 1 to 1,024 positions, by powers of two; beyond, the curve goes on as between the last two."""

_ROW = 0.02
"""Cost of a further position before two numbers of positions were measured, in passes of one. An optimistic prior is
corrected by measurement, a pessimistic one is never tested."""

_SAMPLES = 4.0  # of a knot, from which on it no longer moves along with those below it
_LARGEST = 50.0  # bound of a stored logarithm of seconds
_MOST_BYTES = 1 << 20  # a stored file has some kilobytes


class Curve:
    """Seconds of a forward pass by its number of token positions, linear between knots, which are there up to the most
    positions that were measured.

    A measurement shifts the whole curve (the machine is slower now, the context longer) and its nearest two knots
    (the cost of so many positions), the latter more the fewer samples they have; knots above, as far as they lack
    samples, move along with these.

    Beyond the last knot, at R positions, a pass of r goes on by what its seconds are made of. It reads growth g(r), in
    passes of one position, and computes for each of its positions:

        T(r) = b g(r) + a r,  so that a knot e(r) = T(r) / g(r) is b + a r / g(r)
        a = (e(R) - e(1)) / (R / g(R) - 1),  as g(1) = 1

    A dense model's g is 1, and the curve goes on along the line from one position to R. A mixture's flattens as its
    experts come to be read, and rows go on. Where each row reads weights of its own R / g(R) is about 1, and the knots
    say little of a: the difference is then taken to be 1, which makes it less.
    """

    def __init__(self, logs: list[float] | None = None) -> None:
        self.growth: Callable[[float], float] = lambda rows: 1.0  # of a dense model
        self._logs = list(logs or [0.0])
        self._counts = [_SAMPLES if logs else 0.0] * len(self._logs)  # of each knot, exponentially weighted
        self._measured = 4 if logs else 0

    def seconds(self, rows: float) -> float:
        """Expected seconds of a pass of `rows` >= 1 positions; in units of a one-position pass before any
        measurement.
        """
        return self._each(rows) * self.growth(rows)

    def _each(self, rows: float) -> float:
        """Seconds for what a pass of one position reads."""
        last = len(self._logs) - 1
        if rows > 1 << last and last < _KNOTS - 1:
            return self._beyond(rows)
        knot, share = self._place(rows)
        low, high = (exp(self._logs[min(i, last)]) for i in (knot, knot + 1))
        return low + share * (high - low)

    def _beyond(self, rows: float) -> float:
        first, last, most = exp(self._logs[0]), exp(self._logs[-1]), 1 << len(self._logs) - 1
        each = most / self.growth(most)
        row = _ROW * first if most == 1 else min((last - first) / max(1.0, each - 1), last / each)
        return last + row * (rows / self.growth(rows) - each)

    def _place(self, rows: float) -> tuple[int, float]:
        """The index of the knot below, and the fraction of the way to the next one; the last two go on."""
        knot = min(int(rows).bit_length() - 1, max(0, len(self._logs) - 2))
        return knot, rows / (1 << knot) - 1

    def observe(self, rows: int, seconds: float, growth: float | None = None) -> None:
        """Update the curve by a pass of `rows` positions that took `seconds`. growth: what it has read; what it was
        expected to, if left out.
        """
        if not 0 < seconds < float("inf"):
            return
        while len(self._logs) <= min((rows - 1).bit_length(), _KNOTS - 1):
            self._logs.append(log(self._each(1 << len(self._logs))))
            self._counts.append(0.0)
        wrong = log(seconds / (self._each(rows) * (growth or self.growth(rows))))
        knot, share = self._place(rows)
        above, share = min(knot + 1, len(self._logs) - 1), min(share, 1.0)
        known = (1 - share) * self._counts[knot] + share * self._counts[above]
        common, own = wrong, 0.0
        if self._measured:
            wrong = min(wrong, 0.2)
            common = wrong * max(1 / (self._measured + 1), 1 / 16) * known / (known + 1)
            own = wrong * max(1 / (known + 1), 1 / 32)
        logs = [value + common for value in self._logs]
        below, beyond = self._shares(knot, above, share)
        logs[knot] += own * below
        for i in range(knot + 1, len(logs)):
            free = max(0.0, 1 - self._counts[i] / _SAMPLES)
            logs[i] += own * (beyond if i == above and share else free)
        for i in reversed(range(above)):  # a further position is never cheaper
            logs[i] = min(logs[i], logs[i + 1])
        for i in range(above, len(logs) - 1):
            logs[i + 1] = max(logs[i + 1], logs[i])
        self._logs, self._measured = logs, self._measured + 1
        self._counts = [0.99 * count for count in self._counts]
        self._counts[knot] += 1 - share
        self._counts[above] += share

    def _shares(self, knot: int, above: int, share: float) -> tuple[float, float]:
        """How much of a correction the two knots take: more the nearer they are and the fewer samples they have, and so
        that the curve between them moves by all of it (normalised least mean squares).
        """
        low, high = (1 / (self._counts[i] + _SAMPLES) for i in (knot, above))
        both = (1 - share) ** 2 * low + share**2 * high
        return min(2.0, (1 - share) * low / both), min(2.0, share * high / both)

    def report(self) -> list[float]:
        """The knots, for a later run; empty without measurements."""
        return [round(value, 4) for value in self._logs] if self._measured else []

    @classmethod
    def of(cls, stored: object) -> Curve:
        """A curve from an earlier run's report; a fresh one where the report isn't valid."""
        fits = isinstance(stored, list) and 0 < len(stored) <= _KNOTS
        if not fits or not all(isinstance(value, int | float) and abs(value) < _LARGEST for value in stored):  # type: ignore[attr-defined]
            return cls()
        return cls([float(value) for value in stored])  # type: ignore[attr-defined]


class DraftCost:
    """Seconds of a drafter's part of a step: a constant, and a cost per token of its limit.

    Normalised least mean squares, with a step size of 1 / (n + 1), at least 1/8.
    """

    def __init__(self, start: float, token: float, measured: int = 0) -> None:
        self.start, self.token, self._measured = start, token, measured

    def seconds(self, limit: int) -> float:
        return self.start + self.token * limit

    def observe(self, limit: int, seconds: float) -> None:
        if not self._measured:  # the prior may be in passes yet: what was seen takes its place
            self.start, self.token, self._measured = seconds / 2, seconds / (2 * limit), 1
            return
        expected, some = self.seconds(limit), limit / 2  # two tokens weigh as much as the constant
        wrong = min(seconds, 2 * expected + 1e-5) - expected
        step = wrong * max(1 / (self._measured + 1), 1 / 8) / (1 + some * some)
        self.start = max(0.0, self.start + step)
        self.token = max(0.0, self.token + some * step / 2)
        self._measured += 1


def costs_file(config: object, dtype: str, device: object, threads: int, *, strict: bool, streamed: int | None) -> Path:
    """The path of a model's latencies on this machine. streamed: bytes that each pass reads from disk; None where
    none are.
    """
    what = {
        **({} if streamed is None else {"streamed": f"{streamed >> 24}"}),  # 16 MiB
        "machine": f"{platform.node()} {platform.machine()}",
        "config": repr(config),
        "dtype": dtype,
        "device": str(device),
        "strict": str(strict),
        "threads": str(threads),
    }
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "costs" / f"{name}.json"


def read(path: Path) -> dict[str, Any] | None:
    """A report that `write` stored; None where there is none or it is invalid."""
    try:
        return read_json(path, _MOST_BYTES, "The file of costs")
    except UsageError:
        return None


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report atomically. A folder that can't be written is no error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced(path, lambda place: place.write_text(json.dumps(report), encoding="utf-8"))
