"""The subcommands, and the parsing of arguments by typer.

Takes the arguments; gives the exit code of a command that ran, or raises any error as one of longspec's own. A
subcommand is imported when it is named, so that help is instant; none may import torch at its top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.main import get_command

from longspec import __version__
from longspec.cli.options.typer_classes import Command, Group, origin
from longspec.errors import UsageError

__all__ = ["SUMMARIES", "invoke", "program"]

_HELP = {"help_option_names": ["--help", "-h"], "max_content_width": 100}

# The base class of typer's argument errors: its module differs by release, its place in the hierarchy doesn't.
_ArgumentError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

SUMMARIES = {
    "run": "Answer one prompt.",
    "chat": "Hold a conversation.",
    "batch": "Answer many prompts, and write each answer as a line of JSON.",
    "command": "Print a shell command for a request; nothing is run.",
    "serve": "Keep a model loaded, and answer OpenAI's API with it on this machine.",
    "train": "Train a head that drafts for a model, on what the model answers.",
    "export": "Write a trained head for vLLM or llama.cpp.",
    "tune": "Find how a model is best run on this machine: dtype, threads, drafting, and what --drafter skip leaves "
    "out.",
    "plan": "Show what each kind of cache takes for a text, and which fit, without loading the model.",
    "models": "List the models that are here, and those that can be pulled.",
    "pull": "Fetch a model and print where it is.",
    "logs": "Show the answers that --log kept.",
    "forget": "Delete the answers that --remember kept, for all models.",
    "doctor": "Show what this machine has, and what longspec uses of it.",
    "completion": "Print the script that completes longspec's words in a shell.",
    "bench": "Measure, and print a table.",
    "config": "Show and change your settings.",
    "prompts": "List, show and make templates.",
}
"""Every subcommand, in the order of the help, with what the help says of it: known before any is imported."""

_ELSEWHERE = {"command": "longspec.cli.shell.command"}


class _Commands(Mapping[str, Any]):
    """The subcommands by name, each made when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        if name not in SUMMARIES:
            raise KeyError(name)
        return _made(name)

    def __iter__(self) -> Iterator[str]:
        return iter(SUMMARIES)

    def __len__(self) -> int:
        return len(SUMMARIES)


class _Root(Group):
    """The program."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*SUMMARIES.items()])


@cache
def _made(name: str) -> Any:
    """The subcommand of this name."""
    module = import_module(_ELSEWHERE.get(name, f"longspec.cli.commands.{name}"))
    found = getattr(module, name)
    if not isinstance(found, typer.Typer):
        from longspec.cli.options.groups import expanded

        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name, cls=Command, epilog=module.EPILOG, context_settings=_HELP)(expanded(found))
        return get_command(alone)
    command = get_command(found)
    command.name = name
    return command


@cache
def program() -> Any:
    """The program's root command."""
    app = typer.Typer(cls=_Root, add_completion=False, rich_markup_mode=None, context_settings=_HELP)
    app.callback(invoke_without_command=True, epilog=_EPILOG)(_root)
    command: Any = get_command(app)
    command.commands = _Commands()
    return command


_EPILOG = """\b
longspec "a question" is longspec run "a question"; longspec help run is longspec run --help.

\b
Every option can also be set in the environment (LONGSPEC_MAX_NEW_TOKENS=400)
or in ~/.config/longspec/config.toml (max_new_tokens = 400). A flag goes before
the environment, the environment before the file; longspec config shows them.

\b
Exit codes: 0 done, 1 failed while running, 2 wrong usage or bad input,
3 the model can't be had or isn't supported, 4 the memory budget can't be met,
5 a suggested command may destroy something, 130 interrupted (what was written stands).
"""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longspec {__version__}")
        raise typer.Exit


def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Long answers on the machine you have: several tokens per forward pass, exactly the text of plain decoding."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def invoke(arguments: Sequence[str]) -> int:
    """Run the subcommand that the arguments name; its exit code."""
    from longspec.cli.commands import completion

    command = program()
    if (code := completion.respond(command)) is not None:
        return code
    arguments = _meant(arguments)
    try:
        if [*arguments] in ([], ["--help"], ["-h"]):  # typer would import what it parses arguments with
            typer.echo(typer.Context(command, info_name="longspec", **command.context_settings).get_help())
            return 0
        with command.make_context("longspec", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as leaving:
        return int(leaving.exit_code)
    except _ArgumentError as error:
        raise UsageError(_sentence(error)) from error
    return 0


def _meant(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments, with what a hand types by habit in longspec's words."""
    match list(arguments):
        case ["help", *words]:
            return [*words, "--help"]
        case ["version"]:
            return ["--version"]
        case ["ls", *words]:
            return ["models", *words]
        case [question, *_] if " " in question.strip() and not question.startswith("-"):
            return ["run", *arguments]
    return arguments


def _sentence(error: Exception) -> str:
    """A typer error as a message: the error, the argument, and the help to read."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    message = str(getattr(error, "message", "") or error)
    if parameter is None or context is None:
        sentence = error.format_message() if hasattr(error, "format_message") else message
    elif type(error).__name__ == "MissingParameter":
        sentence = f"{origin(context, parameter)} must be given: {parameter.help}"
    else:
        sentence = f"{origin(context, parameter)}: {message}"
    path = context.command_path if context is not None else "longspec"
    sentence = " ".join(sentence.split())
    return f"{sentence}{'' if sentence.endswith(('.', '?')) else '.'} See {path} --help."
