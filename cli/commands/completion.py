"""`longspec completion`: the shell script that completes subcommands, options and template names.

typer generates the script, and answers when the shell calls longspec with the words so far in the environment.
"""

from __future__ import annotations

import os
from contextlib import suppress
from enum import StrEnum
from typing import Annotated, Any

import typer

__all__ = ["EPILOG", "completion", "respond"]

_VARIABLE = "_LONGSPEC_COMPLETE"

EPILOG = """\b
To have it in every new shell:
  bash: echo 'eval "$(longspec completion bash)"' >> ~/.bashrc
  zsh:  echo 'eval "$(longspec completion zsh)"' >> ~/.zshrc   (below compinit)
  fish: longspec completion fish > ~/.config/fish/completions/longspec.fish
"""


class Shell(StrEnum):
    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(
    ctx: typer.Context, shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]
) -> None:
    """Print the script that completes longspec's words in a shell."""
    from typer.completion import show_callback

    nothing: Any = None
    with suppress(SystemExit):  # typer's --show-completion exits when it is done
        show_callback(ctx, nothing, shell.value)


def respond(command: Any) -> int | None:
    """Print the completions that a shell asks for, and return the exit code. None where no shell asks."""
    if not os.environ.get(_VARIABLE):
        return None
    from typer.completion import get_completion_inspect_parameters

    get_completion_inspect_parameters()  # registers typer's own shell classes
    try:
        command.main([], prog_name="longspec", complete_var=_VARIABLE)
    except SystemExit as end:  # typer exits when it is done
        return int(end.code or 0)
    return 0
