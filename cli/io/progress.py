"""Progress on stderr before there is an answer: plain notes, and a bar where stderr is a terminal; and lines and tables
as wide as a terminal is.

Takes stages with their progress and total; draws nothing in pipes, logs and terminals without colours (NO_COLOR), and
is silent with --quiet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from longspec.cli.io import signals

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Progress", "folded", "printable", "table", "thinking"]

_DOWNLOADING = "downloading"
_WAITING = "waiting"
_FETCHING = "fetching "
_QUANTIZING = "quantizing "


class Progress:
    """At most one line that is drawn, and removed by `stop`."""

    def __init__(self, model: str, *, quiet: bool = False, verbose: bool = False) -> None:
        self.model = model
        self.quiet = quiet
        self.verbose = verbose  # for those who say more then
        self.drawn = not quiet and _can_draw()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def say(self, sentence: str) -> None:
        """One plain line."""
        if self.quiet or sys.stderr is None:
            return
        self.stop()
        with suppress(OSError):
            print(folded(f"longspec: {sentence}"), file=sys.stderr, flush=True)

    def report(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Draw a stage's progress; without a total, an indeterminate bar. A download is also noted as a line, drawn
        or not, and so is what loses accuracy.
        """
        signals.check()
        if stage != self._stage:
            self._enter(stage)
        if not self.drawn or stage.startswith(_FETCHING):
            return
        if self._bar is None:
            self._bar = _bar()
            self._task = self._bar.add_task(stage, total=None)
            self._bar.start()
        assert self._task is not None
        if not total and self._bar.tasks[0].total is not None:  # rich keeps an earlier total where none is given
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task(stage, total=None)
        self._bar.update(self._task, description=stage, completed=done, total=total or None)

    def stop(self) -> None:
        """Remove the bar; nothing is drawn after this returns."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _enter(self, stage: str) -> None:
        self._stage = stage
        if stage.startswith(_FETCHING):  # huggingface_hub draws bars of its own
            self.stop()
        elif stage == _DOWNLOADING:
            self.say(_first_run(self.model))
        elif stage.startswith(_QUANTIZING):
            self.say(f"{self.model}: {stage}")
        elif stage.startswith(_WAITING) and not self.drawn:
            self.say(stage)


def _first_run(model: str) -> str:
    """What is said where the default model is fetched: it is tiny, and another one fits."""
    from longspec.cli.io.fitting import best_here

    said = f"{model} isn't on this machine yet: pulling it once (92 MB)"
    if (entry := best_here().entry) is None:
        return said
    return f"{said}. It is tiny; this machine runs {entry.name} ({entry.about}), which longspec pull --fit fetches"


def thinking(tokens: int) -> str:
    """The line drawn in place of hidden reasoning."""
    return f"thinking… {tokens:,} tokens"


def folded(line: str, stream: int = 2) -> str:
    """A line for stderr, or another stream: at a terminal its words are wrapped at the edge, else it is one line."""
    if not os.isatty(stream):
        return line
    from textwrap import fill

    columns = _columns(stream)
    return "\n".join(fill(part, columns, break_long_words=False, break_on_hyphens=False) for part in line.splitlines())


def _columns(stream: int) -> int:
    """The width of a stream's terminal, in letters; 80 where it doesn't say."""
    try:
        return os.get_terminal_size(stream).columns or 80
    except OSError:
        return 80


def table(rows: Sequence[Sequence[str]], right: Collection[int] = (), stream: int = 1) -> str:
    """The rows as lines; the first has the columns' names. right: the columns that are aligned at their right edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if i in right else f"{cell:{width}}" for i, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    if not os.isatty(stream) or max(map(len, lines)) <= _columns(stream):
        return "\n".join(lines)
    (name, *names), *others = rows
    told = [
        f"{name} {first}: " + ", ".join(f"{key.lower()} {cell}" for key, cell in zip(names, cells, strict=True))
        for first, *cells in others
    ]
    return "\n".join(folded(line, stream) for line in told)


def printable(text: str, keep: str = "") -> str:
    """A text that may quote an untrusted file, without control characters except those of `keep`."""
    return "".join(letter if letter.isprintable() or letter in keep else " " for letter in text)


def _can_draw() -> bool:
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb")


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Known(ProgressColumn):
        """A column that is shown only with a total."""

        def __init__(self, column: ProgressColumn) -> None:
            self.column = column
            super().__init__()

        def render(self, task: Task) -> Any:
            return Text("") if task.total is None else self.column.render(task)

    columns = [SpinnerColumn(finished_text="⠿"), TextColumn("{task.description}")]
    known = [BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()]
    return Progress(*columns, *map(Known, known), console=Console(stderr=True), transient=True)
