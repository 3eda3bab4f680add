"""Parsers of option values: bounded numbers, sizes, words of a list.

Invalid values are reported here, before anything heavy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import typer

from longspec.errors import UsageError
from longspec.machine.system import parse_bytes
from longspec.sampling.parameters import Bounds

__all__ = ["address", "large", "number", "one_of", "size", "tokens", "whole"]


def number(bounds: Bounds) -> Callable[[object], Any]:
    """A parser of numbers within bounds."""

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
    """A parser of integers from `least` to `most`."""
    return number(Bounds(int, least, most))


def large(text: object) -> int:
    """A whole number of at least 1, also as 1e7."""
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not (value >= 1 and value < 1e15 and value == int(value)):
        raise typer.BadParameter(f"{str(text)!r} is not a whole number of at least 1, such as 5000 or 1e7.")
    return int(value)


def one_of(*words: str) -> Callable[[object], str]:
    """A parser of these words."""

    def read(text: object) -> str:
        if str(text) not in words:
            raise typer.BadParameter(f"{str(text)!r} is none of: {', '.join(words)}.")
        return str(text)

    return read


def size(text: object) -> int | str:
    """Parse a size of memory in bytes, or `auto`."""
    try:
        return "auto" if str(text) == "auto" else parse_bytes(str(text))
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


def tokens(text: object) -> int:
    """Parse a number of tokens; k means 1,024."""
    digits, kilo = (str(text)[:-1], 1024) if str(text)[-1:] in ("k", "K") else (str(text), 1)
    return int(whole(1)(digits)) * kilo


def address(text: object) -> tuple[str, int]:
    """Parse HOST:PORT; an IPv6 address may stand in brackets."""
    host, _, port = str(text).rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise typer.BadParameter(f"{str(text)!r} is no HOST:PORT, such as 10.0.0.1:29400.")
    return host.removeprefix("[").removesuffix("]"), int(port)
