"""What the other APIs' bodies have in common while they become bodies of a chat.

Takes parsed untrusted JSON; gives plain values, or a RequestError. The chat's own checks come after it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from longspec.requests.fields import RequestError, shown, typed
from longspec.requests.shapes import MOST_MESSAGES

__all__ = ["kinds", "objects", "refuse_others", "renamed"]


def objects(value: object, name: str) -> list[dict[str, Any]]:
    """A list of objects, of at most MOST_MESSAGES."""
    if isinstance(value, list) and len(value) > MOST_MESSAGES:
        raise RequestError(f"{name} has {len(value):,}; it may have {MOST_MESSAGES:,}.", param=name)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise RequestError(f"{name} is {shown(value)}; it must be a list of objects.", param=name)
    return value


def kinds(parts: object, name: str, known: Sequence[str]) -> list[dict[str, Any]]:
    """A text as one part of type text, or a list of parts whose types are known."""
    if isinstance(parts, str):
        return [{"type": "text", "text": parts}]
    for i, part in enumerate(found := objects(parts, name)):
        if part.get("type") not in known:
            wanted = f"{', '.join(known[:-1])} or {known[-1]}" if len(known) > 1 else known[0]
            raise RequestError(
                f"{name}[{i}].type is {shown(part.get('type'))}; it must be {wanted}.", param=f"{name}[{i}].type"
            )
        if "text" in str(part["type"]):
            typed(part, "text", str, place=f"{name}[{i}]")
    return found


def renamed(body: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The fields that are there, under a chat's names."""
    return {chat: body[own] for own, chat in names.items() if body.get(own) is not None}


def refuse_others(body: Mapping[str, Any], read: Container[str], idle: Mapping[str, Sequence[Any]]) -> None:
    """Raise RequestError where a field is neither read nor asks for nothing."""
    for name, value in body.items():
        if name not in read and value is not None and value not in idle.get(name, ()):
            raise RequestError(f"{name} isn't supported; leave it out.", param=name, code="unsupported")
