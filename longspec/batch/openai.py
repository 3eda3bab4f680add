"""OpenAI's batch format: requests in, responses out, as their page on the Batch API shows them.

Takes a line's object; gives an Item, or an answer as the object that OpenAI would have written. What a request asks for
and we can't do is refused, since dropping it silently would be another answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from longspec.batch.requests import Fault, Id, Item, checked_id, conversation, named_options

if TYPE_CHECKING:
    from longspec.engine.answer import Answer

__all__ = ["CHAT", "COMPLETIONS", "is_openai", "openai_request", "response"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_OURS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stop_loops")
_CHATS = {"reasoning_effort": "effort", "reasoning_budget": "reasoning_budget"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that we can't follow, with the values that ask for nothing."""

_IDLE = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
_READ = {"model", "messages", "prompt", "max_tokens", "max_completion_tokens", *_OURS}


def is_openai(fields: Mapping[str, Any]) -> bool:
    """Whether a line's object looks like a request of this format."""
    return "custom_id" in fields and "body" in fields


def openai_request(index: int, fields: Mapping[str, Any]) -> Item | Fault:
    """The request of one line."""
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
        return Item(index, name, _prompt(url, body), cast("Any", _options(url, body)), url)
    except ValueError as wrong:
        return Fault(index, name, str(wrong))


def _prompt(url: str, body: Mapping[str, Any]) -> Any:
    if url == CHAT:
        return conversation(body.get("messages"), "messages")
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError("'prompt' must be a text")
    return prompt


def _options(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    for field, value in body.items():
        if field in _READ or field in _IDLE or value is None or (url == CHAT and field in _CHATS):
            continue
        if field not in _NEUTRAL:
            raise ValueError(f"'body' has the field {field!r}, which isn't supported")
        if value not in _NEUTRAL[field]:
            raise ValueError(f"'body' asks for {field!r}, which isn't supported with this value")
    options: dict[str, Any] = {**named_options({field: body.get(field) for field in _OURS})}
    limit = body.get("max_completion_tokens")
    limit = body.get("max_tokens") if limit is None else limit
    options |= named_options({"max_new_tokens": limit})
    if url == CHAT:
        options |= named_options({ours: body.get(theirs) for theirs, ours in _CHATS.items()})
    if options.get("top_p") == 1:  # asks for nothing, and clients send it with temperature 0
        del options["top_p"]
    if options.get("temperature") == 0:
        options = {field: value for field, value in options.items() if field not in ("top_p", "top_k", "min_p")}
    return options | ({"raw": True} if url == COMPLETIONS else {})


def response(item: Item, answer: Answer) -> dict[str, Any]:
    """What the batch's output holds for a request that was answered."""
    reason = "stop" if answer.finish_reason == "stop" else "length"
    if item.url == CHAT:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        kind, prefix, choice = "chat.completion", "chatcmpl", {"index": 0, "message": message}
    else:
        kind, prefix, choice = "text_completion", "cmpl", {"index": 0, "text": answer.text}
    prompt, completion = answer.usage["prompt_tokens"], answer.usage["completion_tokens"]
    return {
        "status_code": 200,
        "request_id": f"req_{item.index}",
        "body": {
            "id": f"{prefix}-{item.index}",
            "object": kind,
            "created": int(time.time()),
            "model": answer.model,
            "choices": [{**choice, "logprobs": None, "finish_reason": reason}],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
                "completion_tokens_details": {"reasoning_tokens": answer.usage["reasoning_tokens"]},
            },
        },
    }
