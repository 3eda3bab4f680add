"""The seam of call formats: what a family's file says of how calls are written.

Takes tools; gives grammar rules in llguidance's Lark, and a reader of the text. Knows no tokens and no model.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from longspec.calls.reader import Reader

__all__ = ["Format", "Tool", "literal", "schema_rule"]

# As for other schemas: the spelling of json.dumps, in which no model can write blanks for ever.
_SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: the JSON schema of its arguments, an object's."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool

    @property
    def told(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


class Format(ABC):
    """How calls are written: `mark then body (between body)* after`, behind any text or in its place."""

    mark: ClassVar[str]
    """Where text ends and calls begin."""
    then: ClassVar[str] = ""
    between: ClassVar[str]
    after: ClassVar[str] = ""
    alone: ClassVar[bool] = False
    """Calls are the whole answer: the mark means something at its beginning only."""
    lead: ClassVar[str] = ""
    """What an answer that calls nothing begins with."""
    tokens: ClassVar[tuple[str, ...]] = ()
    """What vocabularies may have as special tokens, and is text here."""

    @abstractmethod
    def is_of(self, template: str) -> bool:
        """Whether a model with this chat template writes calls so."""

    @abstractmethod
    def body(self, tool: Tool, name: str) -> list[str]:
        """Grammar rules of one call of a tool, the first of which is `name`."""

    @abstractmethod
    def reads(self, reader: Reader, tools: Mapping[str, Tool]) -> Generator[None]:
        """Read an answer that grows: say text, and begin and argue calls. tools: those that there are, by name."""


def literal(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text)


def schema_rule(name: str, schema: Mapping[str, Any]) -> str:
    """A rule for JSON of a schema."""
    bare = {key: value for key, value in schema.items() if key != "x-guidance"}
    return f"{name}: %json {json.dumps({**bare, 'x-guidance': _SPELLING})}"
