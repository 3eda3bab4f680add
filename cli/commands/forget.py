"""`longspec forget`: deletes the answers that `--remember` stored."""

from __future__ import annotations

import typer

from longspec.machine.system import shown

__all__ = ["EPILOG", "forget"]

EPILOG = """\b
Example:
  longspec forget
"""


def forget() -> None:
    """Delete the answers that --remember kept, for all models."""
    from longspec.drafters.common.answer_store import forget as clear
    from longspec.drafters.common.answer_store import outputs_folder

    nbytes = clear()
    typer.echo(f"{shown(nbytes)} deleted" if nbytes else f"nothing is kept in {outputs_folder()}", err=True)
