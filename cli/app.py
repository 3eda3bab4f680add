"""The subcommands, and the parsing of arguments by typer.

Takes the arguments; gives the exit code of a command that ran, or raises any error as one of longspec's own. Every
subcommand is imported here, so none may import torch at its top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from longspec import __version__
from longspec.cli.commands import batch, chat, completion, doctor, forget, models, plan, pull, run, serve, train, tune
from longspec.cli.commands.bench import bench
from longspec.cli.commands.config import config
from longspec.cli.commands.prompts import prompts
from longspec.cli.options.groups import expanded
from longspec.cli.options.typer_classes import Command, Group, origin
from longspec.cli.shell import command as shell
from longspec.errors import UsageError

__all__ = ["app", "invoke"]

_HELP = {"help_option_names": ["--help", "-h"], "max_content_width": 100}

# The base class of typer's argument errors: its module differs by release, its place in the hierarchy doesn't.
_ArgumentError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(cls=Group, add_completion=False, rich_markup_mode=None, context_settings=_HELP)

_MODULES = {
    "run": run,
    "chat": chat,
    "batch": batch,
    "command": shell,
    "serve": serve,
    "train": train,
    "tune": tune,
    "plan": plan,
    "models": models,
    "pull": pull,
    "forget": forget,
    "doctor": doctor,
    "completion": completion,
}
for _name, _module in _MODULES.items():
    app.command(_name, cls=Command, epilog=_module.EPILOG, context_settings=_HELP)(expanded(getattr(_module, _name)))

app.add_typer(bench, name="bench")
app.add_typer(config, name="config")
app.add_typer(prompts, name="prompts")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longspec {__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog="""\b
Every option can also be set in the environment (LONGSPEC_MAX_NEW_TOKENS=400)
or in ~/.config/longspec/config.toml (max_new_tokens = 400). A flag goes before
the environment, the environment before the file; longspec config shows them.

\b
Exit codes: 0 done, 1 failed while running, 2 wrong usage or bad input,
3 the model can't be had or isn't supported, 4 the memory budget can't be met,
5 a suggested command may destroy something, 130 interrupted (what was written stands).
""",
)
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
    command = get_command(app)
    if (code := completion.respond(command)) is not None:
        return code
    try:
        with command.make_context("longspec", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as leaving:
        return int(leaving.exit_code)
    except _ArgumentError as error:
        raise UsageError(_sentence(error)) from error
    return 0


def _sentence(error: Exception) -> str:
    """A typer error as a message: the error, the argument, and the help to read."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    message = str(getattr(error, "message", "") or error)
    if parameter is None or context is None:
        sentence = error.format_message() if hasattr(error, "format_message") else message
    else:
        sentence = f"{origin(context, parameter)}: {message}"
    path = context.command_path if context is not None else "longspec"
    sentence = " ".join(sentence.split())
    return f"{sentence}{'' if sentence.endswith(('.', '?')) else '.'} See {path} --help."
