"""`longspec command`: one shell command for a request, printed and never run.

The command goes to stdout, what is dangerous about it to stderr. Reads the request before it loads anything.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

import typer

from longspec.cli.io import signals
from longspec.cli.io.progress import Progress
from longspec.cli.io.prompt_input import read_prompt
from longspec.cli.io.stdout import Output
from longspec.cli.options import shared as options
from longspec.cli.shell.environment import SHELLS, Place, here
from longspec.errors import LongspecError, UsageError

__all__ = ["DESTRUCTIVE", "EPILOG", "command"]

DESTRUCTIVE = 5
"""The exit code of a command that may destroy something."""

_INITS = ("bash", "zsh", "fish")
_MOST_REQUEST = 2000
_WHAT, _HOW = "Command", "Output"

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


def command(
    request: Annotated[
        str | None,
        typer.Argument(
            metavar="REQUEST", rich_help_panel=_WHAT, help="What the command is to do. - reads standard input."
        ),
    ] = None,
    shell: Annotated[
        str | None,
        typer.Option(
            "--shell",
            metavar="NAME",
            rich_help_panel=_WHAT,
            help=f"The shell that it is for: {', '.join(SHELLS)}. $SHELL if left out.",
        ),
    ] = None,
    number: Annotated[
        int,
        typer.Option(
            "--number",
            "-n",
            metavar="N",
            parser=options.whole(1),
            rich_help_panel=_WHAT,
            help="Up to N different commands, one a line, the best first; 1 if left out.",
        ),
    ] = 1,
    allow_destructive: Annotated[
        bool,
        typer.Option(
            "--allow-destructive/--no-allow-destructive",
            rich_help_panel=_WHAT,
            help=f"End with 0, and not with {DESTRUCTIVE}, where a command may destroy something.",
        ),
    ] = False,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="SHELL",
            rich_help_panel=_WHAT,
            help=f"Print a key binding for {', '.join(_INITS)}: Alt-G replaces the line by a command for it.",
        ),
    ] = None,
    no_stdin: options.NoStdin = False,
    model: options.Model = "smollm2",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    seed: options.Seed = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain/--no-explain",
            rich_help_panel=_HOW,
            help="Say on stderr what each program in the command is, as far as this machine knows.",
        ),
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Print a shell command for a request; nothing is run."""
    if init is not None:
        Output().write(_binding(init))
        return
    place, output = here(shell), Output()
    with Progress(model, quiet=quiet) as progress:
        text = " ".join(
            read_prompt(request, [], no_stdin=no_stdin or request not in (None, "-"), say=progress.say).split()
        )
        if len(text) > _MOST_REQUEST:
            raise UsageError(
                f"The request has {len(text):,} characters; {_MOST_REQUEST:,} is the most, so say it shorter."
            )
        lines = _suggest(
            text, place, number, seed or 0, progress, model=model, device=device, dtype=dtype, threads=threads
        )
        progress.stop()
        if not lines:
            raise LongspecError(
                f"No answer of {model} was a command that {place.shell} reads and whose programs are here; say the "
                "request in other words, or name a larger model with -m."
            )
        from longspec.cli.shell.danger import judge  # late: every other command starts sooner

        destructive = False
        for line in lines:
            for harm in judge(line):
                destructive = True
                progress.stop()
                typer.echo(f"longspec: dangerous: {harm}" + (f" ({line})" if len(lines) > 1 else ""), err=True)
            if explain:
                from longspec.cli.shell.explain import explained

                for said in explained(line):
                    progress.say(said)
        output.write("".join(f"{line}\n" for line in lines))
    if destructive and not allow_destructive:
        raise typer.Exit(DESTRUCTIVE)


def _suggest(
    request: str,
    place: Place,
    number: int,
    seed: int,
    progress: Progress,
    *,
    model: str,
    device: str,
    dtype: str,
    threads: int | None,
) -> list[str]:
    progress.report(f"loading {model}")
    from longspec.cli.shell.suggest import suggest
    from longspec.engine.engine import Engine

    signals.check()
    engine = Engine.load(model, device=device, dtype=dtype, threads=threads, report=progress.report)

    def step(asked: int) -> None:
        progress.report(f"thinking of a command, answer {asked + 1}")

    return suggest(engine, request, place, count=number, seed=seed, step=step)


def _binding(shell: str) -> str:
    if shell not in _INITS:
        raise UsageError(f"--init is {shell}, for which there is no key binding; give one of {', '.join(_INITS)}.")
    return (files("longspec.cli.shell") / f"init.{shell}").read_text(encoding="utf-8")
