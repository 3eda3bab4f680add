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
from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import exp, log
from pathlib import Path
from typing import Any

from longspec.errors import UsageError
from longspec.machine.files import read_json, replaced
from longspec.machine.system import cache_folder

__all__ = ["Curve", "DraftCost", "costs_file", "read", "write"]

_ROW = 0.02
"""Cost of a further position before two numbers of positions were measured, in passes of one. An optimistic prior is
corrected by measurement, a pessimistic one is never tested."""

_KNOTS = 256
"""At most: each number up to 32 is its own, and of greater ones those that differ by a sixteenth."""

_TRUSTED = 4  # measurements that a stored or undisturbed one counts for
_SLOW = 0.2  # at most, of the logarithm by which a pass took too long: it may have been disturbed
_LARGEST = 1e9  # bound of stored seconds
_MOST_BYTES = 1 << 20  # a stored file has some kilobytes


class Curve:
    """Seconds of a forward pass by its number of token positions: measured ones are knots, and it is linear between.

    A pass's cost isn't smooth: kernels take rows by fours or sixteens. With AVX2 the ninth row of the default model
    costs a fifth of the pass of eight, and the next three half of that together. So what a number of positions takes is
    learned for itself, by a mean in which what lay between its neighbours counts as one measurement. And a measurement
    shifts the whole curve: the machine is slower now, the context longer.

    Beyond the last knot, at R positions, a pass of r goes on by what its seconds are made of. It reads growth g(r), in
    passes of one position, and computes for each of its positions:

        T(r) = b g(r) + a r,  so that a knot e(r) = T(r) / g(r) is b + a r / g(r)
        a = (e(R) - e(1)) / (R / g(R) - 1),  as g(1) = 1

    A dense model's g is 1, and the curve goes on along the line from one position to R. A mixture's flattens as its
    experts come to be read, and rows go on. Where each row reads weights of its own R / g(R) is about 1, and the knots
    say little of a: the difference is then taken to be 1, which makes it less.
    """

    def __init__(self, knots: Mapping[int, float] | None = None) -> None:
        self.growth: Callable[[float], float] = lambda rows: 1.0  # of a dense model
        self._cost = dict(knots or {1: 1.0})  # seconds for what a pass of one position reads
        self._seen = dict.fromkeys(self._cost, _TRUSTED if knots else 0)  # measurements
        self._rows = sorted(self._cost)
        self._measured = _TRUSTED if knots else 0

    def seconds(self, rows: float) -> float:
        """Expected seconds of a pass of `rows` >= 1 positions; in units of a one-position pass before any
        measurement.
        """
        return self._each(rows) * self.growth(rows)

    def _each(self, rows: float) -> float:
        """Seconds for what a pass of one position reads."""
        at = bisect_right(self._rows, rows)
        if at == len(self._rows):
            return self._beyond(rows)
        low, high = self._rows[at - 1], self._rows[at]
        below = self._cost[low]
        return below + (rows - low) / (high - low) * (self._cost[high] - below)

    def _beyond(self, rows: float) -> float:
        most = self._rows[-1]
        first, last, each = self._cost[1], self._cost[most], most / self.growth(most)
        row = _ROW * first if most == 1 else min(max(0.0, last - first) / max(1.0, each - 1), last / each)
        return last + row * (rows / self.growth(rows) - each)

    def measure(self, rows: int, seconds: float, growth: float | None = None) -> None:
        """Take what a pass of `rows` positions takes while nothing else goes on."""
        if 0 < seconds < float("inf"):
            self._add(rows, seconds / (growth or self.growth(rows)))
            self._seen[rows] = self._measured = _TRUSTED

    def observe(self, rows: int, seconds: float, growth: float | None = None) -> None:
        """Update the curve by a pass of `rows` positions that took `seconds`. growth: what it has read; what it was
        expected to, if left out.
        """
        if not 0 < seconds < float("inf"):
            return
        rows = _rounded(rows)
        wrong = log(seconds / (self._each(rows) * (growth or self.growth(rows))))
        if rows not in self._cost:
            self._add(rows, self._each(rows))
        seen, common, own = self._seen[rows], wrong, 0.0
        if self._measured:
            wrong = min(wrong, _SLOW)
            common = wrong * max(1 / (self._measured + 1), 1 / 16) * seen / (seen + 1)
            own = wrong * max(1 / (seen + 2), 1 / 64)
        factor = exp(common)
        self._cost = {knot: factor * cost for knot, cost in self._cost.items()}
        self._cost[rows] *= exp(own)
        self._seen[rows], self._measured = seen + 1, self._measured + 1

    def _add(self, rows: int, each: float) -> None:
        self._cost[rows], self._seen[rows] = each, 0
        self._rows = sorted(self._cost)

    def report(self) -> list[tuple[int, float]]:
        """The knots, for a later run; empty without measurements."""
        return [(rows, float(f"{self._cost[rows]:.4g}")) for rows in self._rows if self._seen[rows]]

    @classmethod
    def of(cls, stored: object) -> Curve:
        """A curve from an earlier run's report; a fresh one where the report isn't valid."""
        if not isinstance(stored, list) or not 0 < len(stored) <= _KNOTS or not all(map(_is_knot, stored)):
            return cls()
        knots = {rows: float(cost) for rows, cost in stored}
        return cls(knots if 1 in knots else None)


def _rounded(rows: int) -> int:
    """The knot of so many positions."""
    step = 1 << max(0, rows.bit_length() - 6)
    return rows // step * step


def _is_knot(stored: object) -> bool:
    """Whether it is a number of positions, and seconds."""
    match stored:
        case [int(rows), int() | float() as seconds]:
            return type(rows) is int and 0 < rows == _rounded(rows) < 1 << 20 and 0 < seconds < _LARGEST
    return False


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
