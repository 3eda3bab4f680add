"""Groups of options: a dataclass whose fields carry typer's metadata, expanded into a command's parameters.

A command takes whole groups (`loading: Loading`), or a part of one (`Annotated[Loading, Only("model")]`). A field's
name is the flag's, unless it says otherwise; a boolean flag has its negation beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

import typer

_T = TypeVar("_T")

__all__ = ["COMMAND_LINE_ONLY", "Only", "Without", "argument", "expanded", "group", "option", "values"]

COMMAND_LINE_ONLY: set[str] = set()
"""Names of options that belong to one call (`once`): neither the environment nor config.toml sets them."""


@dataclass(frozen=True)
class Only:
    """The fields of a group that a command takes; the others keep their defaults."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    @classmethod
    def all(cls) -> Only:
        return Without()

    def takes(self, name: str) -> bool:
        return name in self.names


class Without(Only):
    """The fields of a group that a command doesn't take."""

    def takes(self, name: str) -> bool:
        return name not in self.names


def option(
    default: Any = MISSING,
    what: str = "",
    *,
    flag: str | None = None,
    short: tuple[str, ...] | str = (),
    once: bool = False,
    **more: Any,
) -> Any:
    """A field that is an option. what: its help; flag: its name, where it isn't the field's; short: further ones.

    once: can't be set in settings, as it belongs to one call. panel and the rest are typer's.
    """
    short = (short,) if isinstance(short, str) else short
    return _field(default, {"flag": flag, "short": short, "once": once, "help": what, **more})


def argument(default: Any = MISSING, what: str = "", **more: Any) -> Any:
    """A field that is a positional argument."""
    return _field(default, {"argument": True, "help": what, **more})


def _field(default: Any, more: dict[str, Any]) -> Any:
    return field(metadata=more) if default is MISSING else field(default=default, metadata=more)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option, argument))
def group(panel: str | None = None) -> Callable[[type[_T]], type[_T]]:
    """A class of options under one heading of the help, except those that name another panel."""

    def decorate(cls: type[_T]) -> type[_T]:
        options = dataclass(frozen=True, kw_only=True)(cls)
        cls.__panel__ = panel  # type: ignore[attr-defined]
        for each in fields(options):  # type: ignore[arg-type]
            if each.metadata.get("once"):
                flag = each.metadata["flag"] or each.name
                COMMAND_LINE_ONLY.add(flag.split("/")[0].removeprefix("--").replace("-", "_"))
        return options

    return decorate


def values(options: Any) -> dict[str, Any]:
    """A group's fields by name."""
    return {each.name: getattr(options, each.name) for each in fields(options)}


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its groups' fields as parameters, in typer's form."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for name, parameter in signature(command).parameters.items():
        kind, part = _group_of(hints[name])
        if kind is None:
            parameters.append(parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY))
            continue
        taken = [each for each in fields(kind) if part.takes(each.name)]
        groups[name] = kind, [each.name for each in taken]
        types = get_type_hints(kind)
        parameters += [_parameter(each, types[each.name], kind.__panel__) for each in taken]

    def call(**arguments: Any) -> None:
        built = {name: kind(**{each: arguments.pop(each) for each in taken}) for name, (kind, taken) in groups.items()}
        command(**arguments, **built)

    call.__name__, call.__doc__, call.__module__ = command.__name__, command.__doc__, command.__module__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return call


def _group_of(hint: Any) -> tuple[Any, Only]:
    """The group in a parameter's annotation, and the fields taken of it; None where it isn't a group."""
    kind, part = hint, Only.all()
    if get_origin(hint) is Annotated:
        kind, *marks = get_args(hint)
        part = next((mark for mark in marks if isinstance(mark, Only)), part)
    return (kind if is_dataclass(kind) else None), part


def _parameter(each: Any, kind: Any, panel: str | None) -> Parameter:
    more = dict(each.metadata)
    more["rich_help_panel"] = more.pop("panel", panel)
    if more.pop("argument", False):
        info = typer.Argument(**more)
    else:
        flag, short, _ = more.pop("flag"), more.pop("short"), more.pop("once")
        info = typer.Option(flag or _flag(each.name, kind), *short, **more)
    default = Parameter.empty if each.default is MISSING else each.default
    return Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _flag(name: str, kind: Any) -> str:
    flag = name.replace("_", "-")
    if kind is not bool:
        return f"--{flag}"
    return f"--{flag}/--{flag.removeprefix('no-') if flag.startswith('no-') else f'no-{flag}'}"
