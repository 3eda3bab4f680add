"""A call of a tool, whole and in parts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Call", "CallPart"]


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the model calls. arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """New text of an answer's call number `index`: its name, in its first part, and then its arguments."""

    index: int
    name: str
    arguments: str
