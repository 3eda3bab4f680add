"""The methods of the literature, each with its paper and longspec's option for it, or the reason why there is none.

Pure data that imports nothing: `longspec doctor`, docs/methods.md and the tests read it. The columns are those of two
surveys: whether something beside the target drafts or the target itself (2401.07851), and whether the method is about
what drafts or about which drafts are verified (2411.13157).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from longspec.methods.drafting import DRAFTING
from longspec.methods.method import Method
from longspec.methods.running import RUNNING
from longspec.methods.verification import VERIFICATION

__all__ = ["GROUPS", "Method", "every", "options"]

GROUPS: Mapping[str, Sequence[Method]] = {**DRAFTING, **VERIFICATION, **RUNNING}
"""By heading. A paper with two ideas has a row for each."""


def every() -> Iterator[Method]:
    """All rows, in the order of the page."""
    for methods in GROUPS.values():
        yield from methods


def options() -> dict[str, list[Method]]:
    """What longspec does, by the option that asks for it."""
    found: dict[str, list[Method]] = {}
    for method in every():
        if method.option:
            found.setdefault(method.option, []).append(method)
    return found
