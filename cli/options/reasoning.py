"""What becomes of an answer's reasoning, and of an answer that goes round, as options of a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from longspec.cli.options.parsers import whole
from longspec.errors import UsageError
from longspec.text.reasoning_effort import EFFORTS, checked

if TYPE_CHECKING:
    from longspec.engine.options import Options

__all__ = ["Effort", "HideReasoning", "ReasoningBudget", "StopLoops", "asked"]

_REASONING = "Reasoning"


def _effort(text: object) -> str:
    try:
        return checked(str(text))
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


HideReasoning = Annotated[
    bool,
    typer.Option(
        "--hide-reasoning/--no-hide-reasoning",
        rich_help_panel=_REASONING,
        help="Print what the model says, and not what it thinks before.",
    ),
]
ReasoningBudget = Annotated[
    int | None,
    typer.Option(
        "--reasoning-budget",
        metavar="N",
        parser=whole(0),
        rich_help_panel=_REASONING,
        help="After N tokens of reasoning the section is closed, and the answer follows. 0 leaves none.",
    ),
]
Effort = Annotated[
    str | None,
    typer.Option(
        "--effort",
        metavar="LEVEL",
        parser=_effort,
        rich_help_panel=_REASONING,
        help=f"How much to think, where the model's chat template knows of it: {', '.join(EFFORTS)}.",
    ),
]
StopLoops = Annotated[
    bool,
    typer.Option(
        "--stop-loops/--no-stop-loops",
        rich_help_panel=_REASONING,
        help="End a text that only repeats itself.",
    ),
]


def asked(reasoning_budget: int | None, effort: str | None, stop_loops: bool) -> Options:
    """As the engine takes them."""
    return {"reasoning_budget": reasoning_budget, "effort": effort, "stop_loops": stop_loops}
