"""The APIs by their addresses: how each one's body becomes a request, and the format of its response.

Takes parsed untrusted JSON. A dialect that isn't OpenAI's chat is translated into it, so that all are checked alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import time
from typing import Any
from uuid import uuid4

from longspec.requests import anthropic, responses
from longspec.requests.openai import CHAT, COMPLETIONS
from longspec.requests.replies import Format, Reply
from longspec.server.asks import Ask

__all__ = ["DIALECTS", "Dialect"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """read: gives the body of OpenAI's chat, or completions. reply: gives the format of one response by a model."""

    chat: bool
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    reply: Callable[[Ask, str], Format]


def _chat(wanted: Ask, model: str) -> Format:
    return Reply(True, f"chatcmpl-{uuid4().hex}", int(time()), model, wanted.include_usage)


def _completion(wanted: Ask, model: str) -> Format:
    return Reply(False, f"cmpl-{uuid4().hex}", int(time()), model, wanted.include_usage)


DIALECTS: Mapping[str, Dialect] = {
    CHAT: Dialect(True, dict, _chat),
    COMPLETIONS: Dialect(False, dict, _completion),
    responses.RESPONSES: Dialect(
        True, responses.chat_body, lambda wanted, model: responses.ResponsesReply(int(time()), model)
    ),
    anthropic.MESSAGES: Dialect(True, anthropic.chat_body, lambda wanted, model: anthropic.MessagesReply(model)),
}
