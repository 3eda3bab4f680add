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
from longspec.sampling.parameters import Bounds

__all__ = ["number", "size", "tokens", "whole"]


def number(bounds: Bounds) -> Callable[[object], Any]:
    """Reads a number within bounds."""

    def read(text: object) -> float:
        try:
            value: float = bounds.kind(str(text))
        except ValueError:
            value = math.nan
        if value != value:
            kind = "a whole number" if bounds.kind is int else "a number"
            raise typer.BadParameter(f"{str(text)!r} is not {kind}.")
        if not bounds.hold(value):
            shown = value if bounds.kind is int else text
            raise typer.BadParameter(f"{shown} is out of range; it must be {bounds.words or 'finite'}.")
        return value

    return read


def whole(least: int, most: float = math.inf) -> Callable[[object], Any]:
    """Reads a whole number that isn't below `least`, or above `most`."""
    return number(Bounds(int, least, most))


def size(text: object) -> int | str:
    """Reads a size of memory in bytes, or `auto`."""
    try:
        return "auto" if str(text) == "auto" else parse_bytes(str(text))
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


def tokens(text: object) -> int:
    """Reads a number of tokens; k is 1,024 of them."""
    digits, kilo = (str(text)[:-1], 1024) if str(text)[-1:] in ("k", "K") else (str(text), 1)
    return int(whole(1)(digits)) * kilo
