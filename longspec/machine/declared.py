"""What a declared type takes: annotations as kinds of `longspec.machine.schema`, and arguments held to them.

Takes type hints, and values from a program that no type checker has read; gives nothing, or a UsageError that says what
the value is and what is wanted, or a TypeError for a name that nobody declared. Knows no option.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from longspec.errors import UsageError
from longspec.machine.schema import Kind, shown

__all__ = ["check_names", "declared", "hold", "kind_of"]

_Asked = ParamSpec("_Asked")
_Given = TypeVar("_Given")

_ONE = (str, bytes, Mapping)
"""What can be iterated over, and is one thing nevertheless."""

_KINDS: Mapping[Any, Kind] = {
    Any: Kind("anything", lambda value: True),
    NoneType: Kind("None", lambda value: value is None),
    str: Kind("a text", lambda value: isinstance(value, str)),
    bool: Kind("True or False", lambda value: isinstance(value, bool)),
    int: Kind("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: Kind("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    type: Kind("a class", lambda value: isinstance(value, type)),
    Path: Kind("a path", lambda value: isinstance(value, Path)),
    Mapping: Kind("a dict", lambda value: isinstance(value, Mapping)),
    Callable: Kind("a function", callable),
    Iterable: Kind("a list", lambda value: isinstance(value, Iterable) and not isinstance(value, _ONE)),
}


@cache
def kind_of(hint: Any) -> Kind:
    """What an annotation takes. Of what a function, a dict or an iterable gives, nothing is asked; a list's are."""
    origin, inside = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        kinds = [kind_of(each) for each in inside]
        words = [kind.words for kind in kinds if kind.words != "None"]
        listed = ", ".join(words[:-1]) + " or " * bool(words[1:]) + words[-1]
        return Kind(listed, lambda value: any(kind.holds(value) for kind in kinds))
    if origin is Sequence:
        each = kind_of(inside[0])
        several = [f"{words.removeprefix('a ')}s" for words in each.words.split(" or ")]
        return Kind(
            f"a list of {' or '.join(several)}",
            lambda value: isinstance(value, Collection) and not isinstance(value, _ONE) and all(map(each.holds, value)),
        )
    if origin in _KINDS:
        return _KINDS[origin]
    if not isinstance(origin, type) or getattr(origin, "_is_protocol", False):
        return _KINDS[Any]
    return Kind(f"a {origin.__name__}", lambda value: isinstance(value, origin))


def hold(name: str, value: object, kind: Kind) -> None:
    """Raise UsageError where the value isn't of this kind. name: the beginning of a sentence."""
    if not kind.holds(value):
        raise UsageError(f"{name} is {shown(value)}; it must be {kind.words}.")


def check_names(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Raise TypeError, naming the nearest one, where a keyword isn't known, as for a function's own."""
    for name in given:
        if name not in known:
            near = get_close_matches(name.lower(), known, 1)
            raise TypeError(
                f"{name!r} is not an option of {what}"
                + (f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}.")
            )


def declared(**kinds: Kind) -> Callable[[Callable[_Asked, _Given]], Callable[_Asked, _Given]]:
    """Decorator of a method: hold a call's arguments to its annotations, or to these kinds, which know bounds. Keywords
    that it takes as a TypedDict are held to their names alone.
    """

    def decorate(function: Callable[_Asked, _Given]) -> Callable[_Asked, _Given]:
        parameters = inspect.signature(function).parameters
        further = next((name for name, one in parameters.items() if one.kind is one.VAR_KEYWORD), None)
        named = [name for name in parameters if name != further]

        @cache
        def wanted() -> Mapping[str, Kind]:
            hints = get_type_hints(function)
            return {name: kinds.get(name) or kind_of(hints[name]) for name in named if name in hints}

        @cache
        def known() -> Collection[str]:
            options = () if further is None else get_args(get_type_hints(function)[further])[0].__annotations__
            return [*named[1:], *options]

        @wraps(function)
        def checked(*args: _Asked.args, **keywords: _Asked.kwargs) -> _Given:
            owner = args[0] if isinstance(args[0], type) else type(args[0])
            check_names(keywords, known(), f"{owner.__name__}.{function.__name__}")
            given = {**dict(zip(named, args, strict=False)), **keywords}
            for name, kind in wanted().items():
                if name in given and given[name] is not parameters[name].default:
                    hold(name, given[name], kind)
            return function(*args, **keywords)

        return cast("Callable[_Asked, _Given]", checked)

    return decorate
