"""What steps cost, learned from the seconds that they took: a pass by its rows, drafting by its limit.

Takes measured seconds and gives expected ones; knows no clock, no model and no drafter. A slow machine's moments hardly
count: nothing is ever faster than it can be, but anything may be ten times as slow for once.

Letters: B sessions in a pass, r rows of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any

from longspec.machine.files import replaced
from longspec.machine.system import cache_folder

__all__ = ["Costs", "Curve", "Drafting", "costs_file", "read", "write"]

_KNOTS = 11  # 1 to 1,024 rows, by powers of two; what is beyond goes on as from 512 to there
_ROW = 0.02  # passes that one more row costs, as long as nothing was measured: too little is found out, too much is not
_START, _TOKEN = 0.05, 0.05  # passes that a draft costs, and each token of it, as long as nothing was measured
_SOME = 2  # tokens of a draft that are as much to blame for its seconds as its start is
_OLD = 8  # a stored or borrowed estimate counts as that many measurements
_RELAX, _SURE = 0.2, 4.0  # by that share a knot comes back in a step, if it was measured less often than this
_FADE = 0.99  # of a knot's measurements, in each step
_LARGEST = 50.0  # of a stored logarithm of seconds
_MOST_BYTES = 1 << 20  # a stored file is some kilobytes


_PRIOR = [log(1 + _ROW * (2**knot - 1)) for knot in range(_KNOTS)]


class Curve:
    """Seconds of a pass by its rows: linear between powers of two, where each has its own logarithm.

    A measurement moves the whole curve (the machine is slower now) and its nearest two knots (so many rows cost that
    much), the latter more the less is known of them. Knots above, as long as they weren't measured, go along. Those
    that were measured seldom or long ago come back towards what rows cost at first, until they are tried again: a
    process's first passes take three times as long as the later ones, and what looks dear isn't measured any more.
    """

    def __init__(self, logs: list[float] | None = None, counts: list[float] | None = None) -> None:
        self.measured = _OLD if logs else 0
        self._logs = logs or list(_PRIOR)
        self._counts = counts or [0.0] * _KNOTS
        self._lines = _lines(self._logs)

    def seconds(self, rows: float) -> float:
        """Expected, of a pass of so many rows, 1 at least; before anything was measured, in passes of one row."""
        start, slope = self._lines[int(rows).bit_length()]
        return start + slope * rows

    def observe(self, rows: int, seconds: float) -> None:
        if not 0 < seconds < float("inf"):
            return
        wrong = log(seconds / self.seconds(rows))
        knot = min(rows.bit_length(), _KNOTS - 1) - 1
        above = min(rows / (1 << knot) - 1, 1.0)
        known = (1 - above) * self._counts[knot] + above * self._counts[knot + 1]
        if self.measured == 0:
            whole, near = wrong, 0.0
        else:
            wrong = min(wrong, 0.3 if known < 4 else 0.2)
            whole = wrong * max(1 / (self.measured + 1), 1 / 16) * known / (known + 1)
            near = wrong * max(1 / (known + 1), 1 / 32)
        counts, logs = self._counts, [value + whole for value in self._logs]
        high = logs[knot + 1] + near * above
        low = min(logs[knot] + near * (1 - above), high)
        # Fewer rows never cost more: what says otherwise is older.
        self._logs = [
            *[value if value < low else low for value in logs[:knot]],
            low,
            high,
            *[max(high, logs[i] if counts[i] else logs[i] + near) for i in range(knot + 2, _KNOTS)],
        ]
        for i in range(knot + (2 if above else 1), _KNOTS):
            excess = self._logs[i] - self._logs[i - 1] - (_PRIOR[i] - _PRIOR[i - 1])
            self._logs[i] -= max(0.0, excess) * _RELAX * max(0.0, 1 - counts[i] / _SURE)
        self._lines = _lines(self._logs)
        self._counts = [count * _FADE for count in counts]
        self._counts[knot] += 1 - above
        self._counts[knot + 1] += above
        self.measured += 1

    def report(self) -> dict[str, list[float]]:
        return {
            "logs": [round(value, 4) for value in self._logs],
            "counts": [round(min(count, _OLD), 2) for count in self._counts],
        }

    def like(self) -> Curve:
        """A first estimate for another batch size or context length."""
        return Curve(list(self._logs), [min(count, 2.0) for count in self._counts])


class Drafting:
    """Seconds of one drafter's part in a step: a start, something for each token, and for each that it must catch up.

    Normalised least mean squares: a measurement is met halfway at first, and by an eighth later on.
    """

    def __init__(self, start: float = 0.0, token: float = 0.0, behind: float = 0.0, measured: int = 0) -> None:
        self.start, self.token, self.behind = start, token, behind
        self.measured = measured

    def seconds(self, limit: int, behind: int = 0) -> float:
        """Expected, for the largest limit of a step, and tokens that the drafter wasn't asked about."""
        return self.start + self.token * limit + self.behind * behind

    def observe(self, limit: int, behind: int, seconds: float) -> None:
        if not 0 <= seconds < float("inf"):
            return
        expected = self.seconds(limit, behind)
        seconds = min(seconds, (2 if self.measured else 5) * expected + 1e-5)
        weight = min(behind / 64, 1.0) ** 2  # of what it had to catch up, which may be a whole prompt at first
        some = limit / _SOME
        step = (seconds - expected) * max(1 / (self.measured + 1), 1 / 8) / (1 + some * some + weight)
        self.start = max(0.0, self.start + step)
        self.token = max(0.0, self.token + some * step / _SOME)
        self.behind = max(0.0, self.behind + weight / max(behind, 1) * step)
        self.measured += 1

    def report(self) -> dict[str, float]:
        return {"start": self.start, "token": self.token, "behind": self.behind, "measured": min(self.measured, _OLD)}


class Costs:
    """A curve for each doubling of batch size and of context, from the nearest that there is; each drafter's costs.

    stored: what an earlier run reported; what isn't as expected in it is left out.
    """

    def __init__(self, stored: Mapping[str, Any] | None = None) -> None:
        self._curves: dict[tuple[int, int], Curve] = {}
        self._drafting: dict[str, Drafting] = {}
        for name, curve in _of(stored, "passes").items():
            logs, counts = (_numbers(_of(curve, None).get(key)) for key in ("logs", "counts"))
            batch, _, context = name.partition(" ")
            if logs and counts and batch.isdecimal() and context.isdecimal():
                self._curves[int(batch), int(context)] = Curve(logs, [max(0.0, count) for count in counts])
        for name, drafting in _of(stored, "drafting").items():
            values: list[Any] = [_of(drafting, None).get(key) for key in ("start", "token", "behind", "measured")]
            if all(isinstance(value, int | float) and 0 <= value < 1e6 for value in values):
                start, token, behind, measured = map(float, values)
                self._drafting[name] = Drafting(start, token, behind, int(measured))

    def curve(self, batch: int, context: int) -> Curve:
        """For passes of B sessions with so many tokens each."""
        place = batch.bit_length(), (context // 512).bit_length()
        if place not in self._curves:
            near = min(self._curves, key=lambda at: abs(at[0] - place[0]) + abs(at[1] - place[1]), default=None)
            self._curves[place] = Curve() if near is None else self._curves[near].like()
        return self._curves[place]

    def drafting(self, name: str, pass_seconds: float) -> Drafting:
        """pass_seconds: what a pass of one row takes, of which an unknown drafter's costs are taken to be a tenth."""
        if name not in self._drafting:
            self._drafting[name] = Drafting()
        found = self._drafting[name]
        if not found.measured:
            found.start, found.token = _START * pass_seconds, _TOKEN * pass_seconds
        return found

    def report(self) -> dict[str, Any]:
        """What a later run may begin with."""
        return {
            "passes": {f"{b} {c}": curve.report() for (b, c), curve in self._curves.items() if curve.measured},
            "drafting": {name: drafting.report() for name, drafting in self._drafting.items() if drafting.measured},
        }


def costs_file(**what: str) -> Path:
    """Where costs are kept, by what they depend on: machine, model, dtype, threads and the like."""
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "costs" / f"{name}.json"


def read(path: Path) -> dict[str, Any] | None:
    """What `write` put there; None where there is nothing that can be read."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Atomically: another process reads the old file or the new one. A folder that can't be written is no error."""
    text = json.dumps(report)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced(path, lambda place: place.write_text(text, encoding="utf-8"))


def _lines(logs: Sequence[float]) -> list[tuple[float, float]]:
    """Seconds at no rows and for each, by the rows' bit_length."""
    seconds = [exp(value) for value in logs]
    lines = [(0.0, seconds[0])]
    for knot, (low, high) in enumerate(pairwise(seconds)):
        lines.append((2 * low - high, (high - low) / (1 << knot)))
    return lines + lines[-1:] * 32


def _of(found: Any, key: str | None) -> Mapping[str, Any]:
    if key is not None:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _numbers(found: Any) -> list[float] | None:
    if not isinstance(found, list) or len(found) != _KNOTS:
        return None
    if not all(isinstance(value, int | float) and abs(value) < _LARGEST for value in found):
        return None
    return [float(value) for value in found]
