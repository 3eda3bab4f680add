"""Readers of options' values: numbers between bounds, sizes, words of a list.

What is wrong with a value is said here, before anything heavy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import typer

from longspec.errors import UsageError
from longspec.machine.system import parse_bytes

__all__ = ["number", "size", "tokens", "whole"]


def number(least: float, most: float = math.inf, *, open_below: bool = False, open_above: bool = False) -> Any:
    """Reads a number between two bounds, which count unless they are open."""
    low = f"above {least:g}" if open_below else f"{least:g} or more"
    high = "" if most == math.inf else f" and below {most:g}" if open_above else f" and at most {most:g}"

    def read(text: object) -> float:
        try:
            value = float(str(text))
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise typer.BadParameter(f"{str(text)!r} is not a number.")
        above = value > least if open_below else value >= least
        below = value < most if open_above or most == math.inf else value <= most
        if not (above and below):
            raise typer.BadParameter(f"{text} is out of range; it must be {low}{high}.")
        return value

    return read


def whole(least: int | None = None, most: float = math.inf) -> Callable[[object], int]:
    """Reads a whole number that isn't below `least`, or above `most`."""

    def read(text: object) -> int:
        try:
            value = int(str(text))
        except ValueError:
            raise typer.BadParameter(f"{str(text)!r} is not a whole number.") from None
        if least is not None and not least <= value <= most:
            high = "or more" if most == math.inf else f"to {most}"
            raise typer.BadParameter(f"{value} is out of range; it must be {least} {high}.")
        return value

    return read


def size(text: object) -> int | str:
    """Reads a size of memory in bytes, or `auto`."""
    try:
        return "auto" if str(text) == "auto" else parse_bytes(str(text))
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


def tokens(text: object) -> int:
    """Reads a number of tokens; k is 1,024 of them."""
    number, kilo = (str(text)[:-1], 1024) if str(text)[-1:] in ("k", "K") else (str(text), 1)
    return whole(1)(number) * kilo
