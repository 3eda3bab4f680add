"""Fields of untrusted JSON objects: each has the type required, or is refused with an error message.

Takes parsed JSON; gives values, and the options of a sequence under our own names. Ranges are checked by the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from longspec.errors import UsageError
from longspec.sampling.parameters import PARAMETERS

if TYPE_CHECKING:
    from longspec.engine.options import Options

__all__ = ["OPTIONS", "RequestError", "messages", "named_options", "parse_object", "shown", "stops", "typed"]

OPTIONS: Mapping[str, type] = {
    "max_new_tokens": int,
    **{name: bounds.kind for name, bounds in PARAMETERS.items()},
    "system": str,
    "raw": bool,
    "allow_special_tokens": bool,
    "reasoning_budget": int,
    "effort": str,
    "stop_loops": bool,
}
"""Options that a request may name beside `stop`, and their types in JSON."""

_KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
_MISSING = object()
_SHOWN = 60
_LARGE = 1 << 16


class RequestError(UsageError):
    """An invalid request. param: the invalid field; code: OpenAI's error code."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def parse_object(data: str | bytes, name: str) -> dict[str, Any]:
    """The JSON object of a line or a body; name: what an error calls it. Raises RequestError where it isn't an
    object.
    """
    try:
        value = _large(data) if len(data) > _LARGE else json.loads(data)
    except RecursionError:
        raise RequestError(f"{name} isn't JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise RequestError(f"{name} isn't JSON: {error}.") from None
    if not isinstance(value, dict):
        raise RequestError(f"{name} is {shown(value)}; it must be an object.")
    return value


def _large(data: str | bytes) -> Any:
    """As `json.loads` reads it: 8 MiB in 7 ms instead of 18, in which no other thread of the process runs."""
    from pydantic_core import from_json

    try:
        return from_json(data)
    except ValueError:  # what only json reads (lone surrogates, deep nesting), and its words for what is wrong
        return json.loads(data)


def typed(fields: Mapping[str, Any], name: str, kind: type, default: Any = _MISSING, *, place: str = "") -> Any:
    """A field of this type. An int is a valid float; true and false are no numbers.

    default: the value of a missing or null field. place: the enclosing object, as an error names it.
    """
    value: Any = fields.get(name)
    named = f"{place}.{name}" if place else name
    if value is None:
        if default is _MISSING:
            raise RequestError(f"{named} is missing; it must be {_KINDS[kind]}.", param=named)
        return default
    large = isinstance(value, int) and abs(value) >= 1 << 63
    if kind is float and type(value) is int and not large:
        return float(value)
    if type(value) is not kind or large:
        raise RequestError(f"{named} is {shown(value)}; it must be {_KINDS[kind]}.", param=named)
    return value


def named_options(fields: Mapping[str, Any]) -> Options:
    """The options that an object sets; a null field is left out."""
    options = {name: typed(fields, name, kind) for name, kind in OPTIONS.items() if fields.get(name) is not None}
    if fields.get("stop") is not None:
        options["stop"] = stops(fields)
    return cast("Options", options)


def stops(fields: Mapping[str, Any], most: int | None = None) -> list[str]:
    """The stop strings, at most `most` of them."""
    value = fields.get("stop") or []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"stop is {shown(value)}; it must be a text, or a list of texts.", param="stop")
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise RequestError("stop has half a character (a lone surrogate), which no text has.", param="stop")
    if most is not None and len(texts) > most:
        raise RequestError(f"stop has {len(texts)} texts; it may have {most}.", param="stop")
    return texts


def messages(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a conversation, each with a role and a text; content parts of type text are concatenated.
    Unknown roles and fields are the chat template's.
    """
    listed = typed(fields, "messages", list)
    if not listed:
        raise RequestError("messages is empty; give at least one.", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(listed)]


def _message(message: object, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{place} is {shown(message)}; it must be an object with role and content.", param=place)
    typed(message, "role", str, place=place)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(typed(part, "text", str, place=f"{place}.content") for part in content)
    if not isinstance(content, str):
        wanted = "text, or a list of parts of type text"
        raise RequestError(f"{place}.content is {shown(content)}; it must be {wanted}.", param=f"{place}.content")
    return {**message, "content": content}


def shown(value: object) -> str:
    """A value as quoted in an error message: its first 60 characters, without spelling out the rest of a large one."""
    text = ""
    for piece in json.JSONEncoder().iterencode(value):
        text += piece[: _SHOWN + 1]
        if len(text) > _SHOWN:
            return f"{text[:_SHOWN]}..."
    return text
