"""What `longspec plan --texts` says of a batch on many machines: its time, its cost, and where more texts at a time
stop to pay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from longspec.cli.options.groups import group, option
from longspec.cli.options.parsers import large, whole
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.batch.forecast import Lengths
    from longspec.batch.passes import PassTimes

__all__ = ["Many", "Measured", "forecast", "print_forecast"]

_SATURATED = 0.95
"""Of the highest rate: where more texts in a pass bring no more."""

_TRIED = 2_000
"""Requests by which batch sizes are compared."""

_MOST_NBYTES = 1 << 24


@group("A batch on many machines")
class Many:
    """A batch, and the machines that are to write it."""

    texts: int | None = option(
        None, "Forecast a batch of so many texts (1e7), from --measured.", metavar="N", parser=large, once=True
    )
    nodes: int = option(
        1, "Machines like the measured one, each with one engine.", metavar="N", parser=whole(1), once=True
    )
    measured: str | None = option(
        None, "What a run on such a machine measured: a --summary of longspec batch.", metavar="FILE", once=True
    )
    lengths: str | None = option(
        None,
        "The requests' lengths: answers of longspec batch, or lines with prompt_tokens, completion_tokens and, if they "
        "don't come all at once, arrival in seconds. All alike, as the run's on average, if left out.",
        metavar="FILE",
        once=True,
    )
    batch_size: int | None = option(
        None, "Texts side by side; the measured run's if left out.", metavar="N", parser=whole(1, 4096), once=True
    )
    price: float | None = option(None, "What a machine costs an hour.", metavar="X", once=True)

    def check(self) -> None:
        """Raise UsageError where options are missing, or given for nothing."""
        if self.texts is None and (self.measured or self.lengths or self.price is not None or self.nodes != 1):
            raise UsageError("--nodes, --measured, --lengths and --price are of a batch; give --texts N too.")
        if self.texts is not None and self.measured is None:
            raise UsageError(
                "A forecast needs what a run has measured: longspec batch SOME.jsonl -o some.out --summary run.json on "
                "such a machine, then --measured run.json."
            )


@dataclass(frozen=True, slots=True)
class Measured:
    """A run's figures, and the lengths to forecast with. width: texts side by side."""

    times: PassTimes
    lengths: Lengths
    tokens_per_step: float
    width: int

    @classmethod
    def read(cls, many: Many) -> Measured:
        """Raises UsageError where a file isn't what it should be."""
        import numpy as np

        from longspec.batch.forecast import Lengths
        from longspec.batch.passes import PassTimes
        from longspec.machine.files import read_json

        assert many.measured is not None
        said = read_json(Path(many.measured), _MOST_NBYTES, "The summary")
        times = PassTimes.of(said.get("passes"), many.measured)
        try:
            written, usage = int(said["written"]), said["usage"]
            prompt, answer = (usage[name] / written for name in ("prompt_tokens", "completion_tokens"))
            each, width = float(said["speculation"]["tokens_per_step"]), many.batch_size or int(said["width"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UsageError(f"{many.measured} is no --summary of a batch that wrote something.") from error
        if many.lengths is not None:
            return cls(times, Lengths.read(Path(many.lengths)), each, width)
        alike = np.array([round(prompt)]), np.array([max(1, round(answer))])
        return cls(times, Lengths(*alike, np.zeros(1)), each, width)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return int((self.lengths.prompts + self.lengths.answers).max())


def forecast(many: Many, measured: Measured, memory: int) -> dict[str, Any]:
    """The object that `--json` prints. memory: bytes of an engine with that many texts.

    Raises:
        UsageError: a machine's share is too large to simulate.
    """
    from longspec.batch.forecast import simulate

    assert many.texts is not None
    times, each, arrive = measured.times, measured.tokens_per_step, bool(measured.lengths.arrivals[-1])
    share = -(-many.texts // many.nodes)
    whole = simulate(measured.lengths.drawn(share, many.nodes), times, width=measured.width, tokens_per_step=each)
    some = measured.lengths.drawn(min(share, _TRIED))
    some = type(some)(some.prompts, some.answers, some.arrivals * 0)
    sizes = sorted({1 << n for n in range(measured.width.bit_length())} | {measured.width})
    rates = {size: simulate(some, times, width=size, tokens_per_step=each).rate for size in sizes}
    hours = whole.seconds * many.nodes / 3600
    return {
        "texts": many.texts,
        "nodes": many.nodes,
        "batch_size": measured.width,
        "tokens": whole.tokens * many.nodes,
        "seconds": whole.seconds,
        "tokens_per_second": whole.rate * many.nodes,
        "idle": whole.idle / whole.seconds,
        "waiting_seconds": dict(zip(("median", "p99"), whole.waiting, strict=True)) if arrive else None,
        "node_hours": hours,
        "cost": None if many.price is None else hours * many.price,
        "node_memory_bytes": memory,
        "saturates_at": next(size for size in sizes if rates[size] >= _SATURATED * max(rates.values())),
        "measured_up_to": times.widest,
        "batch_sizes": [{"batch_size": size, "tokens_per_second": rate} for size, rate in rates.items()],
    }


def print_forecast(report: Mapping[str, Any]) -> None:
    from longspec.machine.system import shown

    cost = "" if report["cost"] is None else f", {report['cost']:,.2f} at that price"
    typer.echo(
        f"\n{report['texts']:,} texts on {report['nodes']:,} node{'s' * (report['nodes'] > 1)}, "
        f"{report['batch_size']} at a time: {_time(report['seconds'])}, {report['tokens_per_second']:,.0f} tokens/s, "
        f"{report['node_hours']:,.1f} node hours{cost}; {shown(report['node_memory_bytes'])} a node"
    )
    if (waiting := report["waiting_seconds"]) is not None:
        typer.echo(
            f"A request waits {_time(waiting['median'])} for its answer, one in a hundred {_time(waiting['p99'])}; "
            f"{report['idle']:.0%} of the time is idle."
        )
    typer.echo(f"\n{'AT A TIME':>9}  TOKENS/S A NODE")
    for row in report["batch_sizes"]:
        mark = "" if row["batch_size"] <= report["measured_up_to"] else "  (beyond what was measured)"
        mark += "  saturated" if row["batch_size"] == report["saturates_at"] else ""
        typer.echo(f"{row['batch_size']:9}  {row['tokens_per_second']:15,.1f}{mark}")


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
