"""How much to draft, learned from what passes cost and drafts keep: the controls, by the names that the command takes.

A new control is a class that keeps `longspec.control.policy.Control`, and a line in `CONTROLS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longspec.control.goodput import Goodput
from longspec.control.policy import Control, Entropy, Fixed
from longspec.errors import UsageError

__all__ = ["CONTROLS", "make"]

CONTROLS: dict[str, Callable[[Sequence[str], int, Mapping[str, Any] | None], Control]] = {
    "goodput": Goodput,
    "fixed": lambda drafters, most, learned: Fixed(drafters[0]),
    "entropy": lambda drafters, most, learned: Entropy(drafters[0]),
}


def make(name: str, drafters: Sequence[str], most: int, learned: Mapping[str, Any] | None = None) -> Control:
    """drafters: the first is tried first. most: tokens of a draft. learned: what an earlier run's control reported.

    Raises:
        UsageError: no control has this name.
    """
    if name not in CONTROLS:
        raise UsageError(f"The control {name!r} is not known; use one of: {', '.join(CONTROLS)}.")
    return CONTROLS[name](drafters, most, learned)
