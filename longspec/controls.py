"""The controls, by the names that the command and the engine take."""

from __future__ import annotations

from collections.abc import Sequence

from longspec.control import Confident, Control, Fixed, Sure
from longspec.errors import UsageError
from longspec.goodput import Goodput

__all__ = ["CONTROLS", "make"]

CONTROLS = ("goodput", "fixed", "confidence", "entropy")
"""How much to bet: what brings most tokens per second; always all; likely paths; not after a hard token."""


def make(name: str, drafters: Sequence[str], most: int) -> Control:
    """Raises UsageError: no control has this name."""
    if name not in CONTROLS:
        raise UsageError(f"The control {name!r} is not known; use one of: {', '.join(CONTROLS)}.")
    if name == "goodput" and tuple(drafters) != ("none",):
        return Goodput(drafters, most)
    return {"confidence": Confident, "entropy": Sure}.get(name, Fixed)(drafters[0])
