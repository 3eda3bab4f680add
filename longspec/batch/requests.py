"""One record of an input as something to write, or as the reason why it can't be written.

Takes fields from a foreign file: every one is checked for its kind here, and for its range by the engine. Knows no file
and no format but the JSON object of `longspec batch`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from longspec.batch.template import Template

if TYPE_CHECKING:
    from longspec.engine.options import Options

__all__ = ["Fault", "Id", "Item", "as_object", "checked_id", "conversation", "named_options", "over", "request"]

Id = str | int

_ID_LENGTH = 1000
_SAMPLED = ("top_p", "top_k", "min_p")


@dataclass(frozen=True, slots=True)
class Item:
    """A text to be written. index: the record's place in the input, from 0, blank lines left out."""

    index: int
    id: Id
    prompt: str | Sequence[Mapping[str, Any]]
    options: Options
    url: str | None = None  # of a request in OpenAI's format
    unknown: tuple[str, ...] = ()  # fields that say nothing to us


@dataclass(frozen=True, slots=True)
class Fault:
    """A record that can't be written, and why. id: None where it can't be read."""

    index: int
    id: Id | None
    reason: str
    code: str = "invalid_line"


def request(index: int, number: int, fields: Mapping[str, Any], template: Template | None = None) -> Item | Fault:
    """The object of one line. number: its id, if it has none of its own."""
    name: Id | None = None
    try:
        name = checked_id(fields.get("id"), number, "id")
        if template is not None:
            return Item(index, name, template.fill(fields), named_options(fields))
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if (prompt is None) == (messages is None):
            raise ValueError("the line must have either 'prompt' or 'messages'")
        text = conversation(messages, "messages") if messages is not None else prompt
        if isinstance(text, str) and not text.strip():
            raise ValueError("'prompt' is empty")
        if not isinstance(text, str | list):
            raise ValueError(f"'prompt' is {_kind(text)}; it must be a text")
        options = named_options(fields)
        if messages is not None and options.get("raw"):
            raise ValueError("'raw' sends a text without roles, and 'messages' has roles; leave one out")
        if options.get("system") and (options.get("raw") or _has_system(text)):
            raise ValueError("'system' contradicts 'raw', or a system message in 'messages'; leave one out")
        unknown = tuple(field for field in fields if field not in _KNOWN)
        return Item(index, name, text, options, unknown=unknown)
    except ValueError as wrong:
        return Fault(index, name, str(wrong))


def as_object(text: str) -> dict[str, Any]:
    """A line's JSON object. ValueError where it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the line isn't JSON: {error}") from None
    except RecursionError:
        raise ValueError("the line's JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"the line is {_kind(value)}; it must be an object")
    return value


def checked_id(value: object, default: Id | None, name: str) -> Id:
    """An id that can be written and compared. ValueError where it can't."""
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


def conversation(value: object, name: str) -> list[dict[str, Any]]:
    """Messages with a role and a text each; a content in parts must be of texts. ValueError where they aren't."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} must be a list of messages, at least one")
    read = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{name}[{i}] must be an object with a 'role' and a 'content'")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise ValueError(f"{name}[{i}] has a part that isn't text")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(f"the 'content' of {name}[{i}] is {_kind(content)}; it must be a text")
        read.append({**message, "content": content})
    return read


def named_options(fields: Mapping[str, Any]) -> Options:
    """The options that a record names; null leaves one to the command. ValueError where one is of the wrong kind."""
    found: dict[str, Any] = {}
    for name, (wanted, good) in _OPTIONS.items():
        value = fields.get(name)
        if value is None:
            continue
        if not good(value):
            raise ValueError(f"{name!r} is {_kind(value)}; it must be {wanted}")
        try:
            found[name] = float(value) if wanted == "a number" else value
        except OverflowError:
            raise ValueError(f"{name!r} is out of range") from None
    return cast("Options", found)


def over(defaults: Options, item: Item) -> Options:
    """What the record says over what the command says, which gives way where the two contradict each other."""
    own, left = item.options, dict(defaults)
    gives_way: tuple[str, ...] = _SAMPLED if own.get("temperature") == 0 else ()
    if own.get("raw") or _has_system(item.prompt):
        gives_way += ("system",)
    if own.get("raw"):
        gives_way += ("effort", "reasoning_budget")
    if own.get("system") or not isinstance(item.prompt, str):
        gives_way += ("raw",)
    for name in gives_way:
        left.pop(name, None)
    return cast("Options", {**left, **own, "key": str(item.id)})


def _has_system(prompt: object) -> bool:
    return isinstance(prompt, list) and any(message["role"] == "system" for message in prompt)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_stop(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


_OPTIONS = {
    "max_new_tokens": ("a whole number", _is_whole),
    "temperature": ("a number", _is_number),
    "top_p": ("a number", _is_number),
    "top_k": ("a whole number", _is_whole),
    "min_p": ("a number", _is_number),
    "repetition_penalty": ("a number", _is_number),
    "seed": ("a whole number", _is_whole),
    "stop": ("a text or a list of texts", _is_stop),
    "system": ("a text", lambda value: isinstance(value, str)),
    "raw": ("true or false", lambda value: isinstance(value, bool)),
    "reasoning_budget": ("a whole number", _is_whole),
    "effort": ("a text", lambda value: isinstance(value, str)),
    "stop_loops": ("true or false", lambda value: isinstance(value, bool)),
}
_KNOWN = {"id", "prompt", "messages", *_OPTIONS}

_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}


def _kind(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)
