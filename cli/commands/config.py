"""`longspec config`: the user's settings with the source of each, and changes of one setting at a time.

Names, types and valid values are those of the subcommands' options. Changing one setting doesn't read the others, so
that a file that breaks every other command can be repaired here.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from longspec.cli.io.prompt_input import checked
from longspec.cli.options.groups import Only, expanded
from longspec.cli.options.reporting import Reporting
from longspec.cli.options.settings import (
    Setting,
    change,
    config_path,
    nearest,
    read_settings,
    read_table,
    variable,
    yes_or_no,
)
from longspec.cli.options.typer_classes import Command, Group, kind_of, kinds, settable, settable_of, value_of
from longspec.errors import UsageError

__all__ = ["config"]

config = typer.Typer(cls=Group, add_completion=False, rich_markup_mode=None, help="Show and change your settings.")

_HIDDEN = ("api_key",)
"""Shown as stars: what is on a screen is seen, and what is piped is kept."""


def known(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completions of a setting's name."""
    return [name for name in settable(ctx.find_root().command) if name.startswith(incomplete)]


Name = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=known, help="A flag's name: max_new_tokens or max-new-tokens.")
]
Values = Annotated[
    list[str], typer.Argument(metavar="VALUE", help="As behind the flag; 1 or 0 for a flag without a value.")
]


@config.command("show", cls=Command)
@expanded
def show(ctx: typer.Context, reporting: Annotated[Reporting, Only("as_json")]) -> None:
    """Print every setting, its value, and where that comes from, by the commands that take it.

    In a pipe, one a line, with tabs between them.
    """
    options = settable(ctx.find_root().command)
    settings = read_settings(kinds(options))
    rows: dict[str, dict[str, Any]] = {}
    for name in sorted(options):
        setting = settings.get(name)
        value = value_of(ctx, *options[name], setting)
        if setting is not None and isinstance(setting.value, str) and not isinstance(value, str):
            value = _stored(setting.value, value)  # 6GiB rather than its bytes
        if value is not None and name in _HIDDEN:
            value = "***"
        rows[name] = {"value": value, "from": _from(name, setting)}
    if reporting.as_json:
        typer.echo(json.dumps({"path": str(config_path()), "settings": rows}, ensure_ascii=False))
        return
    table = {name: (_shown(row["value"]), row["from"]) for name, row in rows.items()}
    if not os.isatty(1):
        for name, (value, origin) in table.items():
            typer.echo(f"{name}\t{value}\t{origin}")
        return
    widths = max(map(len, table)), max(len(value) for value, _ in table.values())
    groups: dict[str, list[str]] = {}
    for name in rows:
        groups.setdefault(", ".join(_users(ctx, name)), []).append(name)
    for users, names in sorted(
        groups.items(), key=lambda group: -group[0].count(",")
    ):  # what most commands share first
        typer.echo(f"{users}:")
        for name in names:
            typer.echo(f"  {name:{widths[0]}}  {table[name][0]:{widths[1]}}  {table[name][1]}")


def _users(ctx: typer.Context, setting: str) -> list[str]:
    """The commands that take a setting."""
    root: Any = ctx.find_root().command
    return [name for name, command in root.commands.items() if setting in settable_of(command)]


@config.command("path", cls=Command)
def path() -> None:
    """Print where your config.toml is, or would be."""
    typer.echo(str(config_path()))


@config.command("set", cls=Command, context_settings={"ignore_unknown_options": True})  # a value may be -1
def set_one(ctx: typer.Context, name: Name, values: Values) -> None:
    """Set an option in config.toml: longspec config set max_new_tokens 400. Several values make a list."""
    name, command, parameter = _named(ctx, name)
    texts = [checked(value, name) for value in values]
    kind, flag = kind_of(parameter), f"--{name.replace('_', '-')}"
    if kind != "list" and len(texts) > 1:
        raise UsageError(f"{name} takes one value, and {len(texts)} were given; put a text with spaces in quotes.")
    value: Any = yes_or_no(texts[0], flag) if kind == "flag" else texts if kind == "list" else texts[0]
    read = value_of(ctx, command, parameter, Setting(value, flag))
    _ask_engine(name, read)
    change(name, _stored(texts[0], read) if kind == "value" else value)
    if os.environ.get(variable(name)):
        typer.echo(f"longspec: {variable(name)} is set too, and goes before config.toml", err=True)


@config.command("unset", cls=Command)
def unset(ctx: typer.Context, name: Name) -> None:
    """Take an option out of config.toml."""
    table = read_table()
    if name not in table:  # an unknown key in the file can be removed too
        name, _, _ = _named(ctx, name)
    if name in table:
        change(name, None)
    else:
        typer.echo(f"longspec: {name} isn't set in {config_path()}", err=True)


def _named(ctx: typer.Context, text: str) -> tuple[str, Any, Any]:
    """The setting of a name, of a flag, or of a flag's negation: its name, a subcommand that has it, its parameter.

    Raises:
        UsageError: there is none.
    """
    options = settable(ctx.find_root().command)
    name = text.removeprefix("--").replace("-", "_")
    flag = f"--{name.replace('_', '-')}"
    for setting, (command, parameter) in options.items():
        if setting == name or flag in parameter.opts:
            return setting, command, parameter
    for command in ctx.find_root().command.commands.values():  # type: ignore[attr-defined]
        if any(flag in parameter.opts for parameter in command.params if parameter.param_type_name == "option"):
            raise UsageError(f"{flag} belongs to one call and can't be set; give it to longspec {command.name}.")
    meant = nearest(name, options) or "; `longspec config show` lists them all."
    raise UsageError(f"{text!r} is no option that can be set{meant}")


def _ask_engine(name: str, value: Any) -> None:
    """Check a name that only the engine can check. Raises the engine's UsageError."""
    if name == "drafter" and value != "auto":
        from longspec.drafters.spec import parse

        parse(value, {"draft": "named later"} if "model" in value.split("+") else {})
    elif name == "cache":
        from longspec.engine.options import check as check_options

        check_options("auto", value, False, 1)
    elif name == "control":
        from longspec.control import make

        make(value, ["none"], 1)
    elif name == "device":
        from longspec.model.load import choose_device

        choose_device(value)
    elif name == "dtype":
        from longspec.model.load import check_dtype

        check_dtype(value)


def _stored(text: str, read: Any) -> Any:
    """A number as a number; a word for one (6GiB, 32k) as written."""
    if isinstance(read, float):
        return read
    return read if str(read) == text else text


def _shown(value: Any) -> str:
    """A value in TOML."""
    if value is None:
        return "-"
    import tomlkit

    return str(tomlkit.item(value).as_string())


def _from(name: str, setting: Setting | None) -> str:
    if setting is None:
        return "default"
    return setting.origin if setting.origin == variable(name) else "config.toml"
