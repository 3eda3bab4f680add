"""A prompt template with placeholders for a record's fields: `Classify: {text}`.

A name in braces is looked up in a flat table: nothing is evaluated, so that neither a template nor an untrusted field
can reach into the program. `{{` and `}}` are literal braces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Formatter
from typing import Any

from longspec.errors import UsageError

__all__ = ["Template"]


class Template:
    """A parsed template. Raises UsageError where the text isn't valid."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f"The template {text!r} can't be read: {error}; write {{{{ and }}}} for braces.") from None
        self._parts: list[tuple[str, str | None]] = []
        for literal, name, form, conversion in parts:
            # No format specs or conversions ("{a:b}", "{a!r}"): all between the braces is the name.
            whole = (
                name if name is None else name + (f"!{conversion}" if conversion else "") + (f":{form}" * bool(form))
            )
            if whole is not None and not whole.strip():
                raise UsageError(f"The template {text!r} has empty braces; name a field in them, as in {{text}}.")
            self._parts.append((literal, whole))
        self.names = frozenset(name for _, name in self._parts if name is not None)

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The prompt for a record's fields.

        Raises:
            ValueError: a field is missing, or is neither text nor number.
        """
        return "".join(literal + ("" if name is None else _shown(fields, name)) for literal, name in self._parts)


def _shown(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return json.dumps(value)
    if value is None:
        raise ValueError(f"the template names {name!r}, which is not there")
    raise ValueError(f"the template names {name!r}, which is neither text nor number")
