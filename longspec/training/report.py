"""The report of a training, as a file and as a figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspec.errors import LongspecError
from longspec.machine.files import replaced

__all__ = ["draw", "write_report"]


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
    middle.plot((0, *steps), (report["begun_tokens_per_step"], *worth), marker=".")
    middle.set(xlabel="step", ylabel="tokens per step, held-out prompts")
    right.bar(range(1, len(report["accuracy"]) + 1), report["accuracy"])
    right.set(xlabel="depth", ylabel="accuracy behind true tokens", ylim=(0, 1))
    figure.savefig(path, format="png")
