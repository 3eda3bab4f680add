"""A small schema of values from outside: what each field of a JSON object, or of a file's header, must be.

Takes values and kinds; gives nothing, or an error that names the first field that isn't of its kind. Knows no file and
no meaning: `longspec.model.config_values` has a model's fields, others stand beside what reads them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from longspec.errors import LongspecError

__all__ = ["FLAG", "TABLE", "TEXT", "Kind", "check", "either", "listed", "mapped", "number", "row", "shown", "whole"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value must be."""

    words: str  # as a message names it
    holds: Callable[[Any], bool]


TEXT = Kind("a string", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TABLE = Kind("an object", lambda value: isinstance(value, Mapping))


def whole(least: int, most: int) -> Kind:
    """A whole number within bounds, which belong to it. True and 3.0 are none."""
    return Kind(
        f"a whole number from {least:,} to {most:,}", lambda value: type(value) is int and least <= value <= most
    )


def number(least: float, most: float, *, above: bool = False) -> Kind:
    """A finite number within bounds, of which the lower one is excluded with `above`."""

    def holds(value: object) -> bool:  # NaN and infinity fail the comparison
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return least < value <= most if above else least <= value <= most

    return Kind(f"a number {'above' if above else 'from'} {least:g}, at most {most:g}", holds)


def listed(kind: Kind, most: int) -> Kind:
    """A list of at most so many values, all of one kind."""
    return Kind(
        f"a list of at most {most:,}, each {kind.words}",
        lambda value: isinstance(value, list) and len(value) <= most and all(map(kind.holds, value)),
    )


def row(*kinds: Kind) -> Kind:
    """A list of just these values, each of its own kind."""
    return Kind(
        f"a list of {len(kinds)}: {', '.join(kind.words for kind in kinds)}",
        lambda value: (
            isinstance(value, list)
            and len(value) == len(kinds)
            and all(kind.holds(each) for kind, each in zip(kinds, value, strict=True))
        ),
    )


def mapped(kind: Kind) -> Kind:
    """An object whose values are all of one kind; its names are strings."""
    return Kind(
        f"an object whose values are each {kind.words}",
        lambda value: (
            isinstance(value, Mapping)
            and all(isinstance(name, str) and kind.holds(held) for name, held in value.items())
        ),
    )


def either(first: Kind, second: Kind) -> Kind:
    """A value of one of two kinds."""
    return Kind(f"{first.words} or {second.words}", lambda value: first.holds(value) or second.holds(value))


def check(
    where: str,
    values: Mapping[str, Any],
    kinds: Mapping[str, Kind],
    error: type[LongspecError],
    *,
    needed: frozenset[str] = frozenset(),
) -> None:
    """Hold the values to the kinds of their names. A value of None is one that is left out; `needed` may not be. where:
    a sentence's beginning, such as "config.json".

    Raises:
        `error`: a value isn't of its kind, or is missing.
    """
    for name, kind in kinds.items():
        value = values.get(name)
        if value is None and name in needed:
            raise error(f"{where} lacks {name}, {kind.words}.")
        if value is not None and not kind.holds(value):
            raise error(f"{where} has {shown(value)} as {name}, where {kind.words} was expected.")


def shown(value: object) -> str:
    """A foreign value in a message: printable, and a line long at most."""
    return reprlib.repr(value)[:100]
