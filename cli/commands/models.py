"""`longspec models`: the models on this machine, and those that can be pulled by a short name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from longspec.cli.options.groups import Only, group, option
from longspec.cli.options.reporting import Reporting

__all__ = ["EPILOG", "models"]

EPILOG = """\b
In a pipe: one line per model; name, state, bytes and description, with tabs between them.
The state is here, pull, or unsupported where longspec doesn't read the architecture yet.
"""


@group("Output")
class Listing:
    """What is listed."""

    all: bool = option(
        False, "The whole catalogue: what each model needs, and who may draft for it.", short="-a", once=True
    )


def models(listing: Listing, reporting: Annotated[Reporting, Only("as_json")]) -> None:
    """List the models that are here, and those that can be pulled."""
    if listing.all:
        _catalogue(reporting.as_json)
        return
    from longspec.model.files.hub import installed

    listed = installed()
    if reporting.as_json:
        keys = ("name", "description", "here", "nbytes")
        _json([{key: getattr(model, key) for key in keys} for model in listed])
    elif not os.isatty(1):
        _tabbed([(one.name, "here" if one.here else "pull", one.nbytes, one.description) for one in listed])
    else:
        rows = [("NAME", "STATE", "DESCRIPTION")]
        rows += [(one.name, _state(one.here, one.nbytes, one.name), one.description) for one in listed]
        _aligned(rows)
        typer.echo(
            "longspec models --all lists what can be pulled; longspec pull --fit takes the best for this machine."
        )


def _catalogue(as_json: bool) -> None:
    """Every entry, the default model first."""
    from longspec.machine.system import shown
    from longspec.model.files.catalogue import catalogue
    from longspec.model.files.hub import SHORT_NAMES, installed, is_here

    default = [one for one in installed() if one.name in SHORT_NAMES]
    entries = [
        (one, "here" if is_here(one) else "pull" if one.is_readable else "unsupported") for one in catalogue().values()
    ]
    if as_json:
        keys = ("about", "repository", "file", "licence", "nbytes", "context", "need", "drafter", "family")
        own: list[dict[str, Any]] = [
            {"name": one.name, "state": "here" if one.here else "pull", "about": one.description} for one in default
        ]
        for one, state in entries:
            known = {key: getattr(one, key) for key in keys}
            own.append({"name": one.name, "state": state, **known, "settings": dict(one.settings)})
        _json(own)
    elif not os.isatty(1):
        _tabbed([(one.name, "here" if one.here else "pull", one.nbytes, one.description) for one in default])
        _tabbed([(one.name, state, one.nbytes, f"{one.about} ({one.licence})") for one, state in entries])
    else:
        rows = [("NAME", "STATE", "FILE", "MEMORY", "CONTEXT", "DRAFTER", "WHAT")]
        for model in default:
            state = "here" if model.here else "pull"
            rows.append((model.name, state, "0.1 GB", "", "8,192", "", model.description))
        for one, state in entries:
            sizes = (f"{one.nbytes / 1e9:.1f} GB", shown(one.need), f"{one.context:,}")
            rows.append((one.name, state, *sizes, one.drafter or "", f"{one.about} ({one.licence})"))
        _aligned(rows)


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _tabbed(rows: Sequence[Sequence[object]]) -> None:
    for row in rows:
        typer.echo("\t".join(map(str, row)))


def _aligned(rows: Sequence[Sequence[str]]) -> None:
    """A table for a person, whose last column is as wide as it likes."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _state(here: bool, nbytes: int, name: str) -> str:
    return f"here, {nbytes / 1e6:,.0f} MB" if here else f"longspec pull {name}"
