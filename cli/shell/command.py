"""`longspec command`: one shell command for a request, printed and never run.

The command goes to stdout, warnings about it to stderr. Reads the request before loading anything.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.resources import files
from typing import Annotated, Any

import typer

from longspec.cli.io import signals
from longspec.cli.io.progress import Progress
from longspec.cli.io.prompt_input import read_prompt
from longspec.cli.io.server_client import GoneError, found
from longspec.cli.io.stdout import Output
from longspec.cli.options.groups import Only, argument, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.parsers import whole
from longspec.cli.options.reporting import NO_SERVER, Reporting
from longspec.cli.options.writing import SamplingOptions
from longspec.cli.shell.environment import SHELLS, Place, here
from longspec.cli.shell.served import Served
from longspec.errors import LongspecError, UsageError

__all__ = ["DESTRUCTIVE", "EPILOG", "command"]

DESTRUCTIVE = 5
"""The exit code of a command that may destroy something."""

_INITS = ("bash", "zsh", "fish")
_MOST_REQUEST = 2000

EPILOG = f"""\b
Examples:
  longspec command "find files over 1 GB changed this week"
  line=$(longspec command "count the lines in all c files") && eval "$line"
  longspec command -n 3 --shell fish "what uses port 8080"
  eval "$(longspec command --init bash)"     # then Alt-G turns the line into a command

\b
Nothing is run. A command that may delete, overwrite or end something is said to
be that on stderr, and gives exit code {DESTRUCTIVE} unless it is allowed.
"""


@group("Command")
class Asking:
    """The request, and the shell and number of commands."""

    request: str | None = argument(None, "What the command is to do. - reads standard input.", metavar="REQUEST")
    shell: str | None = option(
        None, f"The shell that it is for: {', '.join(SHELLS)}. $SHELL if left out.", metavar="NAME"
    )
    number: int = option(
        1,
        "Up to N different commands, one a line, the best first; 1 if left out.",
        short="-n",
        metavar="N",
        parser=whole(1),
    )
    allow_destructive: bool = option(
        False, f"End with 0, and not with {DESTRUCTIVE}, where a command may destroy something.", once=True
    )
    init: str | None = option(
        None,
        f"Print a key binding for {', '.join(_INITS)}: Alt-G replaces the line by a command for it.",
        metavar="SHELL",
        once=True,
    )
    no_stdin: bool = option(
        False, "Leave standard input alone. Without it, what is piped in is read to its end.", panel="Prompt"
    )
    no_server: bool = NO_SERVER


@group("Output")
class Explaining:
    """The options of explanations."""

    explain: bool = option(False, "Say on stderr what each program in the command is, as far as this machine knows.")


def command(
    ctx: typer.Context,
    asking: Asking,
    loading: Annotated[Loading, Only("model", "device", "dtype", "threads")],
    sampling: Annotated[SamplingOptions, Only("seed")],
    explaining: Explaining,
    reporting: Annotated[Reporting, Only("quiet")],
) -> None:
    """Print a shell command for a request; nothing is run."""
    if asking.init is not None:
        Output().write(_binding(asking.init))
        return
    place, output = here(asking.shell), Output()
    with Progress(loading.model, quiet=reporting.quiet) as progress:
        text = _request(asking, progress)
        options = loading.engine_options(ctx)
        lines = _suggest(text, place, asking, sampling.seed or 0, progress, loading.model, options)
        progress.stop()
        if not lines:
            raise LongspecError(
                f"No answer of {loading.model} was a command that {place.shell} reads and whose programs are here; say "
                "the request in other words, or name a larger model with -m."
            )
        from longspec.cli.shell.danger import judge  # imported late: other commands start sooner

        destructive = False
        for line in lines:
            for harm in judge(line):
                destructive = True
                progress.stop()
                typer.echo(f"longspec: dangerous: {harm}" + (f" ({line})" if len(lines) > 1 else ""), err=True)
            if explaining.explain:
                from longspec.cli.shell.explain import explained

                for said in explained(line):
                    progress.say(said)
        output.write("".join(f"{line}\n" for line in lines))
    if destructive and not asking.allow_destructive:
        raise typer.Exit(DESTRUCTIVE)


def _request(asking: Asking, progress: Progress) -> str:
    """The request on one line. UsageError where it is too long."""
    no_stdin = asking.no_stdin or asking.request not in (None, "-")
    text = " ".join(read_prompt(asking.request, [], no_stdin=no_stdin, say=progress.say).split())
    if len(text) > _MOST_REQUEST:
        raise UsageError(f"The request has {len(text):,} characters; {_MOST_REQUEST:,} is the most, so say it shorter.")
    return text


def _suggest(
    request: str, place: Place, asking: Asking, seed: int, progress: Progress, model: str, options: dict[str, Any]
) -> list[str]:
    """The suggestions of a server's model, or of one that is loaded here."""
    from longspec.cli.shell.suggest import suggest

    def step(asked: int) -> None:
        progress.report(f"thinking of a command, answer {asked + 1}")

    if not asking.no_server and (path := found(model, options, {})) is not None:
        with suppress(GoneError):
            return suggest(Served(path, progress), request, place, count=asking.number, seed=seed, step=step)
    progress.report(f"loading {model}")
    from longspec.engine.engine import Engine

    signals.check()
    engine = Engine.load(model, report=progress.report, **options)
    return suggest(engine, request, place, count=asking.number, seed=seed, step=step)


def _binding(shell: str) -> str:
    if shell not in _INITS:
        raise UsageError(f"--init is {shell}, for which there is no key binding; give one of {', '.join(_INITS)}.")
    return (files("longspec.cli.shell") / f"init.{shell}").read_text(encoding="utf-8")
