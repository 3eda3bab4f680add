"""`longspec models`: the models on this machine, and those that can be pulled by a short name."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from longspec.cli.options.groups import Only
from longspec.cli.options.reporting import Reporting

__all__ = ["EPILOG", "models"]

EPILOG = """\b
In a pipe: one line per model; name, state, bytes, description and the format of its weights, with tabs between them.
"""


def models(reporting: Annotated[Reporting, Only("as_json")]) -> None:
    """List the models that are here, and those that can be pulled."""
    from longspec.model.files.hub import installed

    listed = installed()
    if reporting.as_json:
        keys = ("name", "description", "here", "nbytes", "format")
        typer.echo(json.dumps([{key: getattr(model, key) for key in keys} for model in listed], ensure_ascii=False))
        return
    if not os.isatty(1):
        for model in listed:
            state = "here" if model.here else "pull"
            typer.echo("\t".join((model.name, state, str(model.nbytes), model.description, model.format or "")))
        return
    rows = [("NAME", "STATE", "WEIGHTS", "DESCRIPTION")]
    for model in listed:
        rows.append((model.name, _state(model.here, model.nbytes, model.name), model.format or "", model.description))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *cells, description in rows:
        padded = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
        typer.echo(f"{'  '.join(padded)}  {description}".rstrip())


def _state(here: bool, nbytes: int, name: str) -> str:
    return f"here, {nbytes / 1e6:,.0f} MB" if here else f"longspec pull {name}"
