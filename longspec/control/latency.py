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

_PRIOR = [log(1 + 0.02 * (2**knot - 1)) for knot in range(_KNOTS)]
"""Log of a pass's cost before anything was measured: 0.02 passes a further position. An optimistic prior is corrected
by measurement, a pessimistic one is never tested."""

_LARGEST = 50.0  # bound of a stored logarithm of seconds
_MOST_BYTES = 1 << 20  # a stored file has some kilobytes


class Curve:
    """Seconds of a forward pass by its number of token positions, linear between knots.

    A measurement shifts the whole curve (the machine is slower now, the context longer) and its nearest two knots
    (the cost of so many positions), the latter more the fewer samples they have. Unmeasured knots above move along,
    and never rise more steeply than the prior.
    """

    def __init__(self, logs: list[float] | None = None) -> None:
        self.growth: Callable[[float], float] = lambda rows: 1.0  # of a dense model
        self._logs = list(logs or _PRIOR)
        self._counts = [4.0 if logs else 0.0] * _KNOTS  # samples of each knot, exponentially weighted
        self._measured = 4 if logs else 0

    def seconds(self, rows: float) -> float:
        """Expected seconds of a pass of `rows` >= 1 positions; in units of a one-position pass before any
        measurement.
        """
        return self._each(rows) * self.growth(rows)

    def _each(self, rows: float) -> float:
        """Seconds for what a pass of one position reads."""
        knot, share = _place(rows)
        low, high = exp(self._logs[knot]), exp(self._logs[knot + 1])
        return low + share * (high - low)

    def observe(self, rows: int, seconds: float, growth: float | None = None) -> None:
        """Update the curve by a pass of `rows` positions that took `seconds`. growth: what it has read; what it was
        expected to, if left out.
        """
        if not 0 < seconds < float("inf"):
            return
        knot, share = _place(rows)
        share = min(share, 1.0)
        wrong = log(seconds / (self._each(rows) * (growth or self.growth(rows))))
        known = (1 - share) * self._counts[knot] + share * self._counts[knot + 1]
        common, own = wrong, 0.0
        if self._measured:
            wrong = min(wrong, 0.2)
            common = wrong * max(1 / (self._measured + 1), 1 / 16) * known / (known + 1)
            own = wrong * max(1 / (known + 1), 1 / 32)
        logs = [value + common for value in self._logs]
        logs[knot + 1] += own * share
        logs[knot] = min(logs[knot] + own * (1 - share), logs[knot + 1])
        for i in range(knot):
            logs[i] = min(logs[i], logs[knot])
        for i in range(knot + (2 if share else 1), _KNOTS):
            free = max(0.0, 1 - self._counts[i] / 4)  # 1 for a knot without samples, 0 for one with 4 or more
            excess = logs[i] - logs[i - 1] - (_PRIOR[i] - _PRIOR[i - 1])
            logs[i] = max(logs[i - 1], logs[i] + free * own - max(0.0, 0.2 * free * excess))
        self._logs, self._measured = logs, self._measured + 1
        self._counts = [0.99 * count for count in self._counts]
        self._counts[knot] += 1 - share
        self._counts[knot + 1] += share

    def report(self) -> list[float]:
        """The knots, for a later run; empty without measurements."""
        return [round(value, 4) for value in self._logs] if self._measured else []

    @classmethod
    def of(cls, stored: object) -> Curve:
        """A curve from an earlier run's report; a fresh one where the report isn't valid."""
        fits = isinstance(stored, list) and len(stored) == _KNOTS
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


def _place(rows: float) -> tuple[int, float]:
    """The index of the knot below, and the fraction of the way to the next one."""
    knot = min(int(rows).bit_length(), _KNOTS - 1) - 1
    return knot, rows / (1 << knot) - 1
