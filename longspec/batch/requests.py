"""One record of an input as an Item to answer, or as a Fault.

Takes fields from an untrusted file: types are checked here, ranges by the engine. Knows no file and no format but the
JSON object of `longspec batch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from longspec.batch.template import Template
from longspec.requests.fields import OPTIONS, RequestError, messages, named_options, typed
from longspec.sampling.parameters import SAMPLED_ONLY, is_greedy

if TYPE_CHECKING:
    from longspec.engine.options import Options

__all__ = ["Fault", "Id", "Item", "checked_id", "fault", "over", "request"]

Id = str | int

_ID_LENGTH = 1000


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt to answer. index: the record's position in the input, from 0, blank lines not counted."""

    index: int
    id: Id
    prompt: str | Sequence[Mapping[str, Any]]
    options: Options
    url: str | None = None  # the endpoint of a request in OpenAI's format
    unknown: tuple[str, ...] = ()  # fields that were ignored


@dataclass(frozen=True, slots=True)
class Fault:
    """A record that can't be answered, and the reason. id: None where it can't be read."""

    index: int
    id: Id | None
    reason: str
    code: str = "invalid_line"


def request(index: int, number: int, fields: Mapping[str, Any], template: Template | None = None) -> Item | Fault:
    """The Item or Fault of a line's object. number: the id of a record without its own."""
    name: Id | None = None
    try:
        name = checked_id(fields.get("id"), number, "id")
        if template is not None:
            return Item(index, name, template.fill(fields), named_options(fields))
        chat = fields.get("messages") is not None
        if chat == (fields.get("prompt") is not None):
            raise ValueError("the line must have either 'prompt' or 'messages'")
        text = messages(fields) if chat else typed(fields, "prompt", str)
        if isinstance(text, str) and not text.strip():
            raise ValueError("'prompt' is empty")
        options = named_options(fields)
        if chat and options.get("raw"):
            raise ValueError("'raw' sends a text without roles, and 'messages' has roles; leave one out")
        if options.get("system") and (options.get("raw") or _has_system(text)):
            raise ValueError("'system' contradicts 'raw', or a system message in 'messages'; leave one out")
        unknown = tuple(field for field in fields if field not in _KNOWN)
        return Item(index, name, text, options, unknown=unknown)
    except Exception as wrong:  # noqa: BLE001  no record may end the batch
        return fault(index, name, wrong)


def fault(index: int, name: Id | None, wrong: Exception) -> Fault:
    """The Fault of a record whose fields brought about this exception."""
    if isinstance(wrong, ValueError | RequestError):
        return Fault(index, name, str(wrong))
    return Fault(index, name, f"the record can't be read: {type(wrong).__name__}: {str(wrong)[:500]}")


def checked_id(value: object, default: Id | None, name: str) -> Id:
    """An id of a valid type. ValueError where it is none."""
    value = default if value is None else value
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{name!r} is {_kind(value)}; it must be a text or a whole number")
    if len(str(value)) > _ID_LENGTH:
        raise ValueError(f"{name!r} has more than {_ID_LENGTH:,} characters")
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} holds a lone surrogate, which UTF-8 can't write") from None
    return value


def over(defaults: Options, item: Item) -> Options:
    """The record's options over the command line's; a command-line option that contradicts a record's is dropped."""
    own = item.options
    gives_way: tuple[str, ...] = tuple(SAMPLED_ONLY) if is_greedy(own.get("temperature")) else ()
    if own.get("raw") or _has_system(item.prompt):
        gives_way += ("system",)
    if own.get("raw"):
        gives_way += ("effort", "reasoning_budget")
    if own.get("system") or not isinstance(item.prompt, str):
        gives_way += ("raw",)
    left = {name: value for name, value in defaults.items() if name not in gives_way}
    return cast("Options", {**left, **own, "key": str(item.id)})


def _has_system(prompt: object) -> bool:
    return isinstance(prompt, list) and any(message["role"] == "system" for message in prompt)


_KNOWN = {"id", "prompt", "messages", "stop", *OPTIONS}

_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}


def _kind(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)
