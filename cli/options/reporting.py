"""The options of a command's messages."""

from __future__ import annotations

from dataclasses import replace

import typer

from longspec.cli.options.conflicts import settle_reporting
from longspec.cli.options.groups import group, option

__all__ = ["NO_SERVER", "RAW_OUTPUT", "Reporting"]

NO_SERVER = option(
    False,
    "Load the model here, also where a `longspec serve` with these settings is up.",
    panel="Model and method",
)

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

    verbose: bool = option(
        False, "Say on stderr what was chosen: the model's files, dtype, cache, drafters, and who answers.", short="-v"
    )

    def settled(self, ctx: typer.Context) -> Reporting:
        """It with quiet, or with what that would silence."""
        return replace(self, **settle_reporting(ctx, self.quiet, stats=self.stats, verbose=self.verbose))
