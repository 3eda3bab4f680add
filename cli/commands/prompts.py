"""`longspec prompts`: the templates of `run --template`; the user's own take precedence over the shipped ones.

Knows the two folders; a template is parsed by longspec.text.prompt_template.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import longspec.prompts as shipped
from longspec.cli.options.groups import Only, expanded, option
from longspec.cli.options.reporting import Reporting
from longspec.cli.options.settings import config_path
from longspec.cli.options.typer_classes import Command, Group
from longspec.errors import LongspecError, UsageError

if TYPE_CHECKING:
    from longspec.text.prompt_template import Template

__all__ = ["NAME", "PARAM", "folders", "load", "prompts"]

prompts = typer.Typer(cls=Group, add_completion=False, rich_markup_mode=None, help="List, show and make templates.")

_SKELETON = """\
+++
description = "What it does, for `longspec prompts list`."
# system = "You are brief."
# temperature = 0
# max_new_tokens = 400
# stop = ["\\n\\n"]

# [parameters.tone]
# help = "how it should sound; without a default it must be given"
# default = "friendly"
+++
Say here what is to be done with this text:

{{ input }}
"""


def known(incomplete: str) -> list[str]:
    """Completions of a template's name."""
    from longspec.text.prompt_template import names

    return [name for name in names(folders()) if name.startswith(incomplete)]


def assignment(text: object) -> tuple[str, str]:
    """Parse name=value; the value may be empty."""
    name, equals, value = str(text).partition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"{str(text)!r} is no assignment; write NAME=VALUE.")
    return name.strip(), value


NAME: Any = option(
    None,
    "Put the prompt into a template (longspec prompts list), or into a file of your own (./NAME.md).",
    flag="--template",
    short="-t",
    metavar="NAME",
    autocompletion=known,
    once=True,
)
PARAM: Any = option(
    None,
    "A parameter of the template (longspec prompts show NAME); may be repeated.",
    flag="--param",
    short="-p",
    metavar="NAME=VALUE",
    parser=assignment,
    once=True,
)
Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=known, help="A template.")]


def folders() -> list[Path]:
    """The templates' folders: the user's own, then the shipped one."""
    return [config_path().parent / "prompts", Path(shipped.__path__[0])]


def load(name: str) -> Template:
    """A template by its name, or by a path with a slash in it.

    Raises:
        UsageError: there is none, or it isn't valid.
    """
    from longspec.text.prompt_template import find, read

    return read(find(name, folders()))


@prompts.command("list", cls=Command)
@expanded
def list_all(reporting: Annotated[Reporting, Only("as_json")]) -> None:
    """List all templates. In a pipe: name, `yours` or `shipped`, and description, with tabs between them."""
    from longspec.text.prompt_template import names, read

    own_folder = folders()[0]
    rows = []
    for name, path in names(folders()).items():
        try:
            description = read(path).description
        except UsageError as error:  # one broken file leaves the others usable
            description = str(error)
        rows.append(
            (name, "yours" if path.parent == own_folder else "shipped", " ".join(description.split()), str(path))
        )
    if reporting.as_json:
        keys = ("name", "origin", "description", "path")
        typer.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], ensure_ascii=False))
        return
    for name, origin, description, _ in rows:
        typer.echo(f"{name:16}{origin:9}{description}" if os.isatty(1) else f"{name}\t{origin}\t{description}")


@prompts.command("show", cls=Command)
def show(name: Name) -> None:
    """Print a template, as its file is."""
    from longspec.text.prompt_template import find

    load(name)  # raises where it isn't valid
    typer.echo(find(name, folders()).read_text(encoding="utf-8-sig").rstrip("\n"))


@prompts.command("new", cls=Command)
def new(name: Annotated[str, typer.Argument(metavar="NAME", help="Of the template; a shipped one is copied.")]) -> None:
    """Begin a template of your own, and print its path: $EDITOR "$(longspec prompts new NAME)"."""
    from longspec.text.prompt_template import check_name, names

    check_name(name)
    own, ours = folders()
    begun = names([ours]).get(name)
    text = begun.read_text(encoding="utf-8") if begun is not None else _SKELETON
    path = own / f"{name}.md"
    try:
        own.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} is there already; edit it, or give another name.") from None
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror}.") from error
    typer.echo(str(path))


@prompts.command("path", cls=Command)
def path(
    name: Annotated[str | None, typer.Argument(metavar="NAME", autocompletion=known, help="A template.")] = None,
) -> None:
    """Print where a template is; without NAME, the folder for your own."""
    from longspec.text.prompt_template import find

    typer.echo(str(folders()[0] if name is None else find(name, folders())))
