"""Draft-length control, learned from pass latency and acceptance: the registry of controls by their command-line
names.

A new control is a subclass of `longspec.control.policy.Control`, and a line in `CONTROLS`.
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
    "entropy": lambda drafters, most, learned: Entropy(drafters[0], (learned or {}).get("entropy", Entropy.LIMITS)),
}


def make(name: str, drafters: Sequence[str], most: int, learned: Mapping[str, Any] | None = None) -> Control:
    """Make a control. drafters: in the order in which they are tried. most: the maximum tokens of a draft. learned:
    the report of an earlier run's control, or what `longspec tune` fitted.

    Raises:
        UsageError: no control has this name.
    """
    if name not in CONTROLS:
        raise UsageError(f"The control {name!r} is not known; use one of: {', '.join(CONTROLS)}.")
    return CONTROLS[name](drafters, most, learned)
