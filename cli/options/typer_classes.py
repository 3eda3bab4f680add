"""The subcommands' argument parsing and help: plain text in groups, with settings as defaults of flags.

typer draws help in boxes and colours; here it is text that reads the same in a pipe, a pager and a terminal. Uses
only features of every typer since 0.20, whose classes otherwise differ by release: contexts and parameters are `Any`
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from longspec.cli.options.groups import COMMAND_LINE_ONLY
from longspec.cli.options.settings import Kind, Setting, read_settings

__all__ = ["Command", "Group", "given", "kind_of", "kinds", "origin", "settable", "settable_of", "value_of"]

_NAMES = ("FILE", "IN...", "LIST", "MODEL", "OUT")
"""The metavars of what is a file, or may be one."""

_ORIGINS = "longspec.settings"
_ALL = "--help-all"
_OFTEN = {
    "run": "prompt file model system template max_new_tokens temperature seed hide_reasoning json_schema output stats",
    "chat": "model system max_new_tokens temperature seed hide_reasoning raw_output stats",
    "batch": "inputs output model system template max_new_tokens temperature seed batch_size quiet",
    "serve": "model host port api_key parallel memory",
}
"""Of commands with many options, those that --help shows: what most people use. --help-all shows every one."""


class Command(TyperCommand):
    """A subcommand whose options can be set in the environment and in config.toml too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does, with settings for the options that `args` leave out."""
        before_dashes = {*takewhile(lambda argument: argument != "--", args)}
        if _ALL in before_dashes and self.name in _OFTEN:
            ctx.meta[_ALL] = True
            typer.echo(ctx.get_help())
            raise typer.Exit
        asks_help = before_dashes & set(ctx.help_option_names)
        # Help, completion and the commands that repair config.toml must work whatever is in it.
        if _settable(self) and not (asks_help or ctx.resilient_parsing):
            own = {setting_name(parameter): kind_of(parameter) for parameter in _settable(self)}
            settings = read_settings(own, lambda: kinds(settable(ctx.find_root().command)))
            own_settings = {parameter.name: settings.get(setting_name(parameter)) for parameter in _settable(self)}
            ctx.meta[_ORIGINS] = named = {
                name: setting for name, setting in own_settings.items() if setting is not None
            }
            several = {parameter.name for parameter in self.params if parameter.multiple}
            ctx.default_map = {
                name: [setting.value] if name in several and not isinstance(setting.value, list) else setting.value
                for name, setting in named.items()
            }
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            for parameter in self.params:
                _refuse_empty(ctx, parameter, ctx.params.get(parameter.name))
        return list(rest)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each under its heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        often = [] if _ALL in ctx.meta else _OFTEN.get(self.name or "", "").split()
        for parameter in self.get_params(ctx):
            if often and parameter.name not in [*often, "help"]:
                continue
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = getattr(parameter, "rich_help_panel", None) or "Other"
                text = getattr(parameter, "help", None) or record[1]  # without the suffixes that some releases add
                groups.setdefault(heading, []).append((_first_name(parameter, record[0]), text))
        if often:
            groups.setdefault("Other", []).append((_ALL, "Show all options."))
        width = max(len(name) for records in groups.values() for name, _ in records)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, text in records], col_max=width + 2)


class Group(TyperGroup):
    """The list of subcommands."""

    command_class = Command

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands first, as they are looked for most."""
        self.format_commands(ctx, formatter)
        records = [parameter.get_help_record(ctx) for parameter in self.get_params(ctx)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record is not None])


def given(ctx: typer.Context, name: str) -> bool:
    """Whether the option is on the command line, and so takes precedence over conflicting settings."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def origin(ctx: Any, parameter: Any) -> str:
    """The source of a parameter's value, in words: a flag, a variable, or a key of config.toml."""
    setting: Setting | None = ctx.meta.get(_ORIGINS, {}).get(parameter.name)
    if setting is not None and not given(ctx, parameter.name):
        return setting.origin
    if parameter.param_type_name == "option":
        return str(parameter.opts[0])
    return str(parameter.metavar or parameter.name.upper()).removesuffix("...")


def setting_name(parameter: Any) -> str:
    """The setting's name of a flag: `--max-new-tokens` is max_new_tokens."""
    long = next(flag for flag in parameter.opts if flag.startswith("--"))
    return str(long.removeprefix("--").replace("-", "_"))


def settable(group: Any) -> dict[str, tuple[Any, Any]]:
    """Every option that can be set, by name: the first subcommand that has it, and its parameter there. All subcommands
    are imported for that, in some tenths of a second.
    """
    options: dict[str, tuple[Any, Any]] = {}
    for command in group.commands.values():
        for parameter in _settable(command):
            options.setdefault(setting_name(parameter), (command, parameter))
    return options


def settable_of(command: Any) -> set[str]:
    """The names of one subcommand's options that can be set; a group of commands has none."""
    return {setting_name(parameter) for parameter in _settable(command)}


def kinds(options: Mapping[str, tuple[Any, Any]]) -> dict[str, Kind]:
    return {name: kind_of(parameter) for name, (_, parameter) in options.items()}


def kind_of(parameter: Any) -> Kind:
    return "flag" if parameter.is_flag else "list" if parameter.multiple else "value"


def value_of(ctx: Any, command: Any, parameter: Any, setting: Setting | None) -> Any:
    """A setting's or a default's value, converted as the subcommand does; raises its error, with the setting's
    source.
    """
    inner = command.context_class(command, info_name=command.name, parent=ctx.find_root())
    inner.meta[_ORIGINS] = {} if setting is None else {parameter.name: setting}
    inner.default_map = {} if setting is None else {parameter.name: setting.value}
    value, _ = parameter.handle_parse_result(inner, {}, [])
    _refuse_empty(inner, parameter, value)
    return value


def _refuse_empty(ctx: Any, parameter: Any, value: Any) -> None:
    """Refuse an empty string, such as a script's unset variable: as a path it would be the current folder."""
    values = value if isinstance(value, list | tuple) else [value]
    if parameter.metavar in _NAMES and "" in values:
        raise typer.BadParameter("the name is empty; give one, or leave it out.", ctx=ctx, param=parameter)


def _settable(command: Any) -> list[Any]:
    return [
        parameter
        for parameter in command.params
        if parameter.param_type_name == "option"
        and not parameter.required  # a required argument has no setting
        and setting_name(parameter) not in COMMAND_LINE_ONLY
    ]


def _first_name(parameter: Any, shown: str) -> str:
    """A flag's name without its negation: every boolean flag has one, which the help says once."""
    return shown.split(" / ")[0] if parameter.param_type_name == "option" else str(parameter.name).upper()
