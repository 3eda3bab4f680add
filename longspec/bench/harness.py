"""Shared parts of all benchmarks: interleaved contenders, their timings, a table, and a report.

A workload yields rows as they are measured, plain values as in docs/benchmarks; it prints and writes nothing.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from longspec import __version__
from longspec.errors import UsageError
from longspec.machine.system import cores, processor, total_bytes

if TYPE_CHECKING:
    from longspec.engine.engine import Engine

__all__ = [
    "Column",
    "Described",
    "Progress",
    "Row",
    "Suite",
    "Table",
    "Took",
    "Turns",
    "Workload",
    "entries",
    "read_suite",
    "report",
    "rotated",
    "sample",
    "setup_of",
    "spread",
]

_Prompt = TypeVar("_Prompt")

Row = dict[str, Any]
"""One line of a table, and one entry of `results` in a report."""

Progress = Callable[[str, int, int], None]
"""Told of a stage, how much of it is done, and how much there is."""

Suite = Mapping[str, Sequence[str]]
"""Prompts by category."""


class Described(Protocol):
    """What a report says of itself."""

    what: str  # a description for the report

    def about(self) -> Row:
        """The setup, known after the measurement: model, dtype, settings."""
        ...


class Workload(Described, Protocol):
    """One kind of benchmark, ready to run."""

    table: Table

    def rows(self, progress: Progress) -> Iterator[Row]:
        """Yield results as they are measured."""
        ...

    def draw(self, rows: Sequence[Row], path: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class Took:
    """The tokens and seconds of one answer or, as they can be added, of several."""

    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0  # decoding: from the end of the prefill to the last token
    steps: int = 0
    steps_without_a_bet: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    different: int = 0  # prompts whose answer differs from plain decoding's
    firsts: tuple[float, ...] = ()  # time to first token of each prompt, in seconds

    def __add__(self, other: Took) -> Took:
        return Took(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Took)))

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Turns:
    """Every prompt is answered by all contenders, in an order that rotates from prompt to prompt, so that other load
    on the machine affects all alike.
    """

    def __init__(self) -> None:
        self._turn = 0

    def write(
        self, contenders: Mapping[str, Callable[[_Prompt], Took]], prompt: _Prompt, tell: Callable[[str], None]
    ) -> dict[str, Took]:
        """Each contender's timing on the prompt; `tell` is called with the name of the next one."""
        took = {}
        for name in rotated(list(contenders), self._turn):
            tell(name)
            took[name] = contenders[name](prompt)
        self._turn += 1
        return {name: took[name] for name in contenders}


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names in the order of a turn: each turn begins with another one."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def setup_of(engine: Engine, new_tokens: int) -> Row:
    """What a report says of greedy answers by one model, of so many tokens at most."""
    model = engine.model
    return {"model": model.name, "dtype": model.dtype, "max_new_tokens": new_tokens, "cache": engine.cache_name}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, minimum and maximum of some values."""
    return {"median": median(values), "least": min(values), "most": max(values)}


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column. width: characters, negative for left-aligned. cell: a format of a row's values, or a function
    from row to text.
    """

    title: str
    width: int
    cell: str | Callable[[Row], str]

    def show(self, row: Row) -> str:
        """A cell's text; empty where the row has no such value."""
        try:
            return self.cell.format(**row) if isinstance(self.cell, str) else self.cell(row)
        except TypeError:  # None can't be formatted as a number
            return ""

    def aligned(self, text: str) -> str:
        return text.ljust(-self.width) if self.width < 0 else text.rjust(self.width)


class Table:
    """A table printed line by line, so that the first results can be read while later ones are measured."""

    def __init__(self, *columns: Column) -> None:
        self.columns = columns

    @property
    def head(self) -> str:
        return "  ".join(column.aligned(column.title) for column in self.columns)

    def line(self, row: Row) -> str:
        return "  ".join(column.aligned(column.show(row)) for column in self.columns)


def report(workload: Described, rows: Sequence[Row], path: Path | None) -> Row:
    """The complete report of a benchmark, also written as JSON where a path is given."""
    import torch

    whole = {
        "what": workload.what,
        **workload.about(),
        "hardware": {
            "machine": platform.machine(),
            "processor": processor(),
            "cores": cores(),
            "memory_bytes": total_bytes(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"longspec": __version__, "torch": torch.__version__},
        "results": list(rows),
    }
    if path is not None:
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


def entries(path: Path) -> list[dict[str, Any]]:
    """The objects of a Spec-Bench file.

    Raises:
        UsageError: a line is not an object with `category` and `turns`.
    """
    found = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                entry = json.loads(line)
                if not (isinstance(entry, dict) and isinstance(entry.get("category"), str) and entry.get("turns")):
                    raise UsageError(f"{path}:{number} has no category and turns; a suite has one such object a line.")
                found.append(entry)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} can't be read as a suite: {why}.") from error
    return found


def read_suite(path: Path) -> dict[str, list[str]]:
    """The first turns of a Spec-Bench file, by category in the file's order."""
    suite: dict[str, list[str]] = {}
    for entry in entries(path):
        suite.setdefault(entry["category"], []).append(str(entry["turns"][0]))
    return suite


def sample(suite: Suite, count: int | None) -> dict[str, list[str]]:
    """At most `count` prompts of each category, evenly spaced; all of them where it is None."""

    def some(prompts: Sequence[str]) -> list[str]:
        taken = len(prompts) if count is None else min(count, len(prompts))
        return [prompts[i * len(prompts) // taken] for i in range(taken)]

    return {category: some(prompts) for category, prompts in suite.items()}
