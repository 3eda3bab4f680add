"""OpenAI's batch format: requests in, responses out, as in the documentation of its Batch API.

Takes a line's object; gives an Item, or an answer as OpenAI's response object. A request with an unsupported field is
refused, since ignoring it would silently change the answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longspec.batch.requests import Fault, Id, Item, checked_id, fault
from longspec.requests.openai import CHAT, COMPLETIONS, read_request
from longspec.requests.replies import Reply

if TYPE_CHECKING:
    from longspec.engine.answer import Answer

__all__ = ["is_openai", "openai_request", "response"]


def is_openai(fields: Mapping[str, Any]) -> bool:
    """Whether a line's object looks like a request of this format."""
    return "custom_id" in fields and "body" in fields


def openai_request(index: int, fields: Mapping[str, Any]) -> Item | Fault:
    """The Item of a request, or the Fault."""
    name: Id | None = None
    try:
        name = checked_id(fields.get("custom_id"), None, "custom_id")
        if fields.get("method", "POST") != "POST":
            raise ValueError("'method' must be POST")
        url, body = fields.get("url"), fields.get("body")
        if url not in (CHAT, COMPLETIONS):
            raise ValueError(f"'url' must be {CHAT} or {COMPLETIONS}")
        if not isinstance(body, dict):
            raise ValueError("'body' must be an object")
        request = read_request(body, chat=url == CHAT)
        if request.stream or request.choices * len(request.prompts) > 1:
            raise ValueError("a line of a batch is one text, whole: leave stream out, and n and prompts at one")
        if request.options.get("logprobs") is not None:
            raise ValueError("log-probabilities aren't told in batches: leave logprobs out")
    except Exception as wrong:  # noqa: BLE001  no record may end the batch
        return fault(index, name, wrong)
    return Item(index, name, request.prompts[0], request.options, url)


def response(item: Item, answer: Answer) -> dict[str, Any]:
    """The response object of an answered request."""
    chat = item.url == CHAT
    reply = Reply(chat, f"{'chatcmpl' if chat else 'cmpl'}-{item.index}", int(time.time()), answer.model)
    body = reply.whole([answer], [item.options.get("seed")], choices=1)
    return {"status_code": 200, "request_id": f"req_{item.index}", "body": body}
