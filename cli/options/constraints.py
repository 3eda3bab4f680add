"""What an answer is held to, as options of a command: a JSON schema or a regular expression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from longspec.engine.options import Options

__all__ = ["JsonSchema", "Regex", "checked"]

JsonSchema = Annotated[
    str | None,
    typer.Option(
        "--json-schema",
        metavar="FILE|JSON",
        rich_help_panel="Output",
        help="Hold the answer to a JSON schema: a file of it, or the schema itself.",
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(
        "--regex",
        metavar="PATTERN",
        rich_help_panel="Output",
        help="Hold the whole answer to a regular expression.",
    ),
]


def checked(json_schema: str | None, regex: str | None) -> Options:
    """What the answer is held to, checked before a model is loaded."""
    if json_schema is None and regex is None:
        return {}
    from longspec.constraints.grammar import grammar_of

    grammar_of(json_schema, regex)
    return {"json_schema": json_schema, "regex": regex}
