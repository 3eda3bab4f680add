"""Evaluation of a head: tokens per step in the engine, with drafts of the maximal length; and the report of a training.

Takes a target and a head that is ready to draft.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspec.drafters import drafter_of
from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.errors import LongspecError
from longspec.heads.format import Trained
from longspec.machine.files import replaced
from longspec.model.load import Model
from longspec.training.distil import Text

__all__ = ["draw", "tokens_per_step", "write_report"]

ANSWER = 64
"""Limit of the answer to a held-out prompt, in tokens."""


def tokens_per_step(
    model: Model, head: Trained, prompts: Sequence[str], options: dict[str, Any]
) -> tuple[float, list[Text]]:
    """Tokens per step over all prompts, generated in one batch; and the texts, which are the same for every head."""
    engine = Engine(model, drafter=drafter_of(model, head), cache="dense", control="fixed")
    sessions = []
    for number, prompt in enumerate(prompts):
        session = engine.open(prompt, key=f"held out {number}", **options)
        session.limit = min(session.limit, session.prompt_length + ANSWER)
        sessions.append(session)
        for _ in engine.prefill(session):
            pass
    while active := [session for session in sessions if session.finish_reason is None]:
        engine.step(active)
    steps = sum(session.stats.steps for session in sessions)
    committed = sum(session.stats.committed for session in sessions)
    return committed / steps, [_text(number, session) for number, session in enumerate(sessions)]


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json, and report.png if matplotlib is installed (the extra `bench`).

    Raises:
        LongspecError: a file can't be written.
    """
    try:
        replaced(folder / "report.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
        replaced(folder / "report.png", lambda path: draw(path, report))
    except ImportError:
        pass
    except OSError as error:
        raise LongspecError(f"{folder} can't be written: {error.strerror or error}.") from error


def draw(path: Path, report: dict[str, Any]) -> None:
    """Plot loss and tokens per step over the steps, and accuracy by depth, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps, losses, worth = zip(*report["history"], strict=True) if report["history"] else ((), (), ())
    left.plot(steps, losses, marker=".")
    left.set(xlabel="step", ylabel="loss per token")
    middle.plot((0, *steps), (report["untrained_tokens_per_step"], *worth), marker=".")
    middle.set(xlabel="step", ylabel="tokens per step, held-out prompts")
    right.bar(range(1, len(report["accuracy"]) + 1), report["accuracy"])
    right.set(xlabel="depth", ylabel="accuracy behind true tokens", ylim=(0, 1))
    figure.savefig(path, format="png")


def _text(number: int, session: Session) -> Text:
    return Text(number, session.prompt_length, session.tokens)
