"""The options of a command's messages."""

from __future__ import annotations

import typer

from longspec.cli.options.conflicts import settle_reporting
from longspec.cli.options.groups import group, option

__all__ = ["RAW_OUTPUT", "Reporting"]

RAW_OUTPUT = option(
    False,
    "At a terminal, print the answer as it is: no Markdown is rendered, and no word wrapped. So it is in pipes anyway.",
)


@group("Output")
class Reporting:
    """JSON output, and the messages on stderr."""

    as_json: bool = option(False, "Print one line of JSON.", flag="--json/--no-json")
    quiet: bool = option(False, "Nothing but errors on stderr.", short="-q")
    stats: bool = option(False, "A line of statistics on stderr, after the answer.")

    def settled(self, ctx: typer.Context) -> tuple[bool, bool]:
        """The values of quiet and stats, at most one of which is true."""
        return settle_reporting(ctx, self.quiet, self.stats)
