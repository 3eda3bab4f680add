"""The options that only `longspec batch` has; those that it shares with other commands are in `options`."""

from __future__ import annotations

from typing import Annotated

import typer

from longspec.batch import FORMATS
from longspec.cli.options.parsers import whole

_FILES = "Input and output"

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IN...",
        rich_help_panel=_FILES,
        help="A file of prompts (.jsonl, .csv, .tsv, .txt), - for standard input, or many files of one prompt each.",
    ),
]
OutputFile = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        rich_help_panel=_FILES,
        help="Where the answers go, one line of JSON each; must be given. What is there is gone on with.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        rich_help_panel=_FILES,
        help=f"What IN is, if its name and first line don't tell: {', '.join(FORMATS)}.",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        rich_help_panel=_FILES,
        help="The prompt of each record, with fields in braces: a column, a key, {text} of a line or a file, {path}.",
    ),
]
FilesFrom = Annotated[
    str | None,
    typer.Option(
        "--files-from",
        metavar="LIST",
        rich_help_panel=_FILES,
        help="Read the names of files of one prompt each from LIST, or from standard input (-).",
    ),
]
Null = Annotated[
    bool,
    typer.Option("--null/--no-null", "-0", rich_help_panel=_FILES, help="The names in LIST end with NUL."),
]
InOrder = Annotated[
    bool,
    typer.Option(
        "--in-order/--no-in-order",
        rich_help_panel=_FILES,
        help="Write answers in the order of the input, not as they finish.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        parser=whole(1),
        rich_help_panel=_FILES,
        help="Take the first N records of the input only.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        parser=whole(1),
        rich_help_panel=_FILES,
        help="Write N texts side by side; 16 if left out. The answers don't depend on it.",
    ),
]
MaxErrors = Annotated[
    int | None,
    typer.Option(
        "--max-errors",
        metavar="N",
        parser=whole(0),
        rich_help_panel=_FILES,
        help="Give up when more than N lines have failed.",
    ),
]
RetryErrors = Annotated[
    bool,
    typer.Option(
        "--retry-errors/--no-retry-errors",
        rich_help_panel=_FILES,
        help="Take the errors out of OUT and try those lines again.",
    ),
]
ContinueAnyway = Annotated[
    bool,
    typer.Option(
        "--continue-anyway/--no-continue-anyway",
        rich_help_panel=_FILES,
        help="Go on in OUT although it was begun with another input, model or setting.",
    ),
]
Summary = Annotated[
    str | None,
    typer.Option(
        "--summary",
        metavar="FILE",
        rich_help_panel=_FILES,
        help="Write what the run did, in numbers, to FILE as JSON.",
    ),
]
