"""The messages of a conversation: a system message, if there is one, then questions and their answers.

Knows no model: whoever answers asks for the messages of a question, and puts the answer behind them.
"""

from __future__ import annotations

from typing import Any

from longspec.errors import UsageError

__all__ = ["Message", "Turns"]

Message = dict[str, Any]


class Turns:
    """The messages so far."""

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[Message] = []
        self._attempt = 0
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message. Setting it (None removes it) leaves the other messages as they are."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *others] if text else others

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    @property
    def key(self) -> str:
        """Of the noise of the answer that was asked for last: each further answer to a question has its own."""
        return f"retry {self._attempt}" if self._attempt else ""

    def question(self, text: str) -> list[Message]:
        """The messages with a question."""
        self._attempt = 0
        return [*self.messages, {"role": "user", "content": text}]

    def last_question(self) -> list[Message]:
        """The messages with the last question, for another answer to it. Raises UsageError where there is none."""
        if not self.turns:
            raise UsageError("Nothing was asked yet, so there is no answer to write again; ask something first.")
        self._attempt += 1
        return self.messages[:-1]

    def reset(self) -> None:
        """Remove all messages but the system message."""
        self.messages = self.messages[: int(self.system is not None)]
