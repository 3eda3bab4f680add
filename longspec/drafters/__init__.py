"""The drafters, by the names that the command and the engine take.

A new one is a file of its own and a line in `DRAFTERS`; the tests that hold every drafter to losslessness read it.
"""

from __future__ import annotations

from collections.abc import Callable

from longspec.drafters.ngram import Ngram
from longspec.drafters.none import Nothing
from longspec.errors import UsageError
from longspec.types import Drafter

__all__ = ["DRAFTERS", "make"]

DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "none": Nothing,
    "ngram": Ngram,
}


def make(name: str) -> Drafter:
    """A new drafter.

    Raises:
        UsageError: no drafter has this name.
    """
    if name not in DRAFTERS:
        raise UsageError(f"There is no drafter named {name!r}; use auto or one of: {', '.join(DRAFTERS)}.")
    return DRAFTERS[name]()
