"""The limits of a template's rendering: time, steps, letters, and what a single operation may make.

Takes work that renders, and the values that its operations meet; gives what the work gives, or says which limit it
reached. The work has a thread of its own, which is left behind if it doesn't come back. Knows no template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from threading import Thread, local
from time import perf_counter
from typing import Any, TypeVar

from jinja2.utils import Namespace

from longspec.errors import UsageError

__all__ = [
    "GUARDS",
    "MOST_ELEMENTS",
    "MOST_LETTERS",
    "MOST_SECONDS",
    "MOST_SOURCE",
    "MOST_STEPS",
    "LateError",
    "TemplateLimitError",
    "awaited",
    "charge",
    "check_operands",
    "limited",
    "refuse_widths",
    "settled",
    "step",
    "taken",
    "weigh",
]

MOST_SOURCE = 128 << 10
"""Letters of a template. Published chat templates have up to 30,000."""

MOST_SECONDS = 5.0
"""Of one rendering, compiling included. A conversation of 1,000 messages takes 0.05."""

MOST_STEPS = 5_000_000
"""Of one rendering: turns of loops, calls, filters, and elements of lists that are copied."""

MOST_LETTERS = 16 << 20
"""That one rendering may make, output and all on the way to it, beside LETTERS_PER_LETTER for each letter given."""

LETTERS_PER_LETTER = 16

MOST_ELEMENTS = 200_000
"""Of a list with the lists in it, each counted as often as it is there."""

_MOST_BITS = 4096  # of a whole number
_MOST_POWER = 64
_DIGITS = 30  # of rounding

_T = TypeVar("_T")
_RUNNING = local()  # `budget`: that of the rendering whose thread this is

_MOST_FORMAT = 10_000  # letters
_WIDE = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:[0-9]{4}|\*|[0-9]{0,3}\.(?:[0-9]{4}|\*))|\{[^{}]*:[^{}]*(?:[0-9]{4}|\{)")
"""A width of a thousand letters and more, or one that an argument gives, in a format of either kind."""


class TemplateLimitError(UsageError):
    """A template that wants more than it may have."""


class LateError(Exception):
    """Work that didn't come back in time."""


class _Budget:
    """What is left to one rendering."""

    def __init__(self, given: int) -> None:
        self.most = MOST_LETTERS + LETTERS_PER_LETTER * given
        self.letters = self.steps = 0
        self.end = perf_counter() + MOST_SECONDS

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MOST_STEPS:
            raise TemplateLimitError(f"it takes more than {MOST_STEPS:,} steps")
        if perf_counter() > self.end:
            raise TemplateLimitError(f"it takes more than {MOST_SECONDS:g} seconds")

    def charge(self, letters: int) -> None:
        self.letters += letters
        if self.letters > self.most:
            raise TemplateLimitError(f"it makes more than {self.most:,} letters")


def limited(work: Callable[[], _T], given: int) -> _T:
    """Run `work`, which compiles or renders a template, within the limits. given: the letters of its variables.

    Raises:
        TemplateLimitError: a limit is reached; the message says which.
        Exception: what `work` raises.
    """

    def run() -> _T:
        _RUNNING.budget = _Budget(given)
        return work()

    try:
        return awaited(run, MOST_SECONDS + 1)
    except LateError:
        raise TemplateLimitError(f"it takes more than {MOST_SECONDS:g} seconds") from None


def awaited(work: Callable[[], _T], seconds: float) -> _T:
    """What `work` gives, in a thread of its own, which is left behind where it doesn't come back: only if it lets go of
    the interpreter meanwhile. Signals are heard.

    Raises:
        LateError: it takes more than so many seconds.
        BaseException: what `work` raises.
    """
    done: list[tuple[_T | None, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except BaseException as error:  # noqa: BLE001  raised again by the caller
            done.append((None, error))

    thread = Thread(target=run, name="awaited", daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise LateError
    value, error = done[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def charge(letters: int) -> None:
    """Count letters that this rendering makes, before they are made. Raises TemplateLimitError."""
    _RUNNING.budget.charge(letters)


def weigh(value: Any, times: int = 1) -> Any:
    """The value; raises TemplateLimitError where it is a list that is larger, with all that is in it, than may be, or
    would be if it were there so many times.
    """
    letters, elements, rest = 0, 0, [value]
    while rest:
        one = rest.pop()
        elements += 1
        if isinstance(one, str):
            letters += len(one)
        elif isinstance(one, Namespace):
            raise TemplateLimitError("it prints a namespace, or puts it into a list")
        elif isinstance(one, Mapping):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset | type({}.items()) | type({}.keys()) | type({}.values())):
            rest += one
        if (elements + len(rest)) * times > MOST_ELEMENTS or letters * times > _RUNNING.budget.most:
            raise TemplateLimitError(f"it makes a list of more than {MOST_ELEMENTS:,} elements, or of too many letters")
    _RUNNING.budget.step(elements)
    return value


def refuse_widths(form: str) -> None:
    """Raise TemplateLimitError where a format asks for a width of a thousand letters, or for one given beside it."""
    if len(form) > _MOST_FORMAT or _WIDE.search(form):
        raise TemplateLimitError(f"it formats with a width beyond 999, or by a long text ({form[:40]!r})")


def step() -> None:
    """Count a step. Raises TemplateLimitError where it is one too many, or time is up."""
    _RUNNING.budget.step()


def taken(value: Any) -> Any:
    """The result of an operation, counted."""
    budget = _RUNNING.budget
    if isinstance(value, str):
        budget.charge(len(value))
    elif isinstance(value, list | tuple | dict):
        budget.step(len(value))
        if len(value) > MOST_ELEMENTS:
            raise TemplateLimitError(f"it makes a list of more than {MOST_ELEMENTS:,} elements")
    return value


def settled(value: Any) -> Any:
    """What an iterator will give, as a list; any other value as it is."""
    return list(islice(value, MOST_ELEMENTS + 1)) if isinstance(value, Iterator) else value


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Raise TemplateLimitError before an operation that would make too much."""
    for one, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(times, int) and isinstance(one, str | list | tuple):
            weigh(one, max(1, times))
            return
    if operator == "%" and isinstance(left, str):
        refuse_widths(left)
        weigh(right)
    if operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(right) > 16:
        weigh(left)
        weigh(right)
    if isinstance(left, int | float) and isinstance(right, int | float):
        bits = [one.bit_length() for one in (left, right) if isinstance(one, int)]
        if max(bits, default=0) > _MOST_BITS or (
            operator == "**" and (abs(right) > _MOST_POWER or max(bits, default=0) > 64)
        ):
            raise TemplateLimitError("it calculates with numbers of more than a thousand digits")


def _replaces(text: Any, old: Any, new: Any, *rest: Any, **more: Any) -> None:
    charge(len(str(text)) + str(text).count(str(old)) * len(str(new)))


def _joins(values: Any, between: Any = "", *rest: Any, **more: Any) -> None:
    if isinstance(values, str) and isinstance(between, list | tuple):  # the method, whose text stands between
        values, between = between, values
    if hasattr(values, "__len__"):
        charge(len(values) * len(str(more.get("d", between))))
        weigh(values)


def _indents(text: Any, width: Any = 4, *rest: Any, **more: Any) -> None:
    charge(len(str(text).splitlines()) * (len(width) if isinstance(width, str) else abs(int(width))))


def _rounds(value: Any, digits: int = 0, *rest: Any, **more: Any) -> None:
    if abs(digits) > _DIGITS:
        raise TemplateLimitError(f"it rounds to more than {_DIGITS} digits")


def _formats(form: Any, *rest: Any, **more: Any) -> None:
    refuse_widths(str(form))
    weigh([*rest, *more.values()])


GUARDS: Mapping[str, Callable[..., None]] = {
    "replace": _replaces,
    "join": _joins,
    "indent": _indents,
    "round": _rounds,
    "format": _formats,
}
"""Checks before filters and methods whose result can be larger than what they are given, by name."""
