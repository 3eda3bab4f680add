"""Where a benchmark's results go: the options, and the writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from longspec.cli.io.distinct import refuse_same_files
from longspec.cli.io.progress import Progress
from longspec.cli.options.groups import group, option
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.bench.harness import Workload

__all__ = ["Results"]


@group()
class Results:
    """Where results go: a table on stdout, JSON, files."""

    as_json: bool = option(
        False, "Print one line of JSON and no table. In a pipe it follows the table anyway.", flag="--json/--no-json"
    )
    output: Path | None = option(None, "Write the results as JSON.", metavar="FILE", once=True)
    plot: Path | None = option(None, "Draw them (.svg or .png).", metavar="FILE")

    def check(self, *read: str | Path | None) -> None:
        """Raise UsageError where a file can't be written, or is one of those read, before an hour of measuring."""
        refuse_same_files({"the report": self.output, "the plot": self.plot}, read)
        for path in filter(None, (self.output, self.plot)):
            if not path.parent.is_dir():
                raise UsageError(
                    f"{path} can't be written: there is no folder {path.parent}; make it, or name another file."
                )
        if self.plot is not None:
            from longspec.bench.plot import load_matplotlib

            load_matplotlib()

    def take(self, workload: Workload, progress: Progress) -> None:
        """Run a benchmark: each row is printed when it is measured, and in a pipe the complete report behind them."""
        from longspec.bench.harness import report

        progress.stop()
        if not self.as_json:
            typer.echo(workload.table.head)
        rows = []
        for row in workload.rows(progress.report):
            progress.stop()
            if not self.as_json:
                typer.echo(workload.table.line(row))
            rows.append(row)
        if self.plot is not None:
            workload.draw(rows, self.plot)
        complete = report(workload, rows, self.output)
        if self.as_json or not os.isatty(1):
            typer.echo(json.dumps(complete))
