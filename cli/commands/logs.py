"""`longspec logs`: the prompts and answers that `--log` kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from longspec.cli.io.progress import Progress
from longspec.cli.options.groups import Only, argument, group, option
from longspec.cli.options.parsers import whole
from longspec.cli.options.reporting import Reporting

__all__ = ["EPILOG", "logs"]

EPILOG = """\b
Examples:
  longspec run --log "Name a river."
  longspec run -c "In which sea does it end?"      (goes on from the last answer)
  longspec logs -n 3
  longspec config set log 1                        (keeps every answer of longspec run)
"""


@group("Output")
class Finding:
    """Which answers."""

    search: str | None = argument(None, "Only those whose prompt or answer has these words.", metavar="WORDS")
    count: int = option(10, "So many, the last ones.", short="-n", metavar="N", parser=whole(1), once=True)


def logs(finding: Finding, reporting: Annotated[Reporting, Only("as_json")]) -> None:
    """Show the answers that --log kept.

    With --json, each is a line.
    """
    from longspec.cli.io import log

    found = log.entries(finding.count, finding.search)
    if not found:
        none = f"no answer in the log has {finding.search!r}" if finding.search else f"nothing is in {log.path()} yet"
        Progress("").say(f"{none}; longspec run --log keeps what is asked and answered")
    for one in found:
        if reporting.as_json:
            typer.echo(json.dumps(asdict(one), ensure_ascii=False))
            continue
        typer.echo(f"# {one.at}  {one.model}  {one.tokens:,} tokens, ended by {one.finish_reason}")
        typer.echo("".join(f"> {line}\n" for line in one.prompt.splitlines()))
        typer.echo(f"{one.answer}\n")
