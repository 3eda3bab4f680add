"""A request body of OpenAI's chat or completions API as prompts and options.

Takes parsed untrusted JSON. An unsupported field is refused by name, unless its value is the default behaviour.
Fields left out (seed, maximum length) stay unset: server and batch have their own defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from longspec.calls.toolbox import MOST_TOOLS
from longspec.requests.fields import RequestError, named_options, shown, stops
from longspec.requests.shapes import (
    MOST_BIASES,
    MOST_MESSAGES,
    Body,
    Chat,
    Completion,
    Message,
    ResponseFormat,
    ToolCall,
    checked,
)
from longspec.sampling.parameters import PARAMETERS, without_idle

if TYPE_CHECKING:
    from longspec.engine.options import Options
    from longspec.text.prompt import Prompt

__all__ = ["CHAT", "COMPLETIONS", "MOST_STOPS", "Request", "read_request"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MOST_STOPS = 16

_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
"""Fields that aren't supported, with the values that are let through: clients send them, and they change nothing."""

_NOT_READ = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_NOT_READ |= {"prompt_cache_retention"}
"""Fields that change no text, whatever their value."""

_OURS = {*PARAMETERS, "stop_loops"}


@dataclass(frozen=True, slots=True)
class Request:
    """The prompts of one body, and the options of their answers."""

    chat: bool
    prompts: tuple[Prompt, ...]
    options: Options  # those that the body sets
    choices: int  # answers per prompt
    stream: bool
    include_usage: bool
    model: str | None


def read_request(body: Mapping[str, Any], *, chat: bool) -> Request:
    """The request of a body.

    Raises:
        RequestError: a field isn't supported, or isn't what it should be.
    """
    body = {name: value for name, value in body.items() if value is not None}
    shape: type[Body] = Chat if chat else Completion
    _refuse_unsupported(body, {*shape.model_fields, "stop", *_OURS})
    _refuse_many(body)
    asked = checked(shape, body)
    if asked.stream_options is not None and not asked.stream:
        raise RequestError("stream_options is for streams; set stream to true too.", param="stream_options")
    options = without_idle(named_options({name: body.get(name) for name in _OURS}))
    if options.get("top_p") == 1:
        del options["top_p"]  # 1 means all tokens: many clients send it without wanting sampling
    if "stop" in body:
        options["stop"] = stops(body, MOST_STOPS)
    options |= {"max_new_tokens": asked.max_tokens, "drafter": asked.longspec.drafter, "logit_bias": _bias(asked)}
    options |= _chat_options(asked) if isinstance(asked, Chat) else _completion_options(cast(Completion, asked))
    return Request(
        chat=chat,
        prompts=(_messages(asked.messages),) if isinstance(asked, Chat) else cast(Completion, asked).prompt,
        options=cast("Options", {name: value for name, value in options.items() if value is not None}),
        choices=asked.n,
        stream=asked.stream,
        include_usage=asked.stream_options is not None and bool(asked.stream_options.include_usage),
        model=asked.model,
    )


def _completion_options(asked: Completion) -> dict[str, Any]:
    return {"raw": True, "logprobs": asked.logprobs}


def _bias(asked: Body) -> dict[int, float] | None:
    bias = asked.logit_bias
    if not bias:
        return None
    if len(bias) > MOST_BIASES:
        raise RequestError(f"logit_bias has {len(bias):,}; it may have {MOST_BIASES:,}.", param="logit_bias")
    wrong = next((name for name in bias if not re.fullmatch("[0-9]{1,12}", name)), None)
    if wrong is not None:
        said = f"logit_bias names {shown(wrong)}; it must name tokens by their numbers."
        raise RequestError(said, param="logit_bias")
    return {int(name): value for name, value in bias.items()}


def _chat_options(asked: Chat) -> dict[str, Any]:
    if asked.top_logprobs and not asked.logprobs:
        raise RequestError("top_logprobs is told beside logprobs; set logprobs to true too.", param="top_logprobs")
    tools = [{"type": tool.type, "function": dict(tool.function)} for tool in asked.tools or ()] or None
    return {
        "max_new_tokens": asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens,
        "effort": asked.reasoning_effort,
        "logprobs": asked.top_logprobs or 0 if asked.logprobs else None,
        "reasoning_budget": asked.reasoning_budget,
        "json_schema": None if asked.response_format is None else _schema(asked.response_format),
        "tools": tools,
        "tool_choice": asked.tool_choice if tools or asked.tool_choice not in ("auto", "none") else None,
        "parallel_calls": asked.parallel_tool_calls if tools else None,
    }


def _schema(wanted: ResponseFormat) -> dict[str, Any] | None:
    if wanted.type == "json_schema":
        if wanted.json_schema is None and wanted.given is not None:
            return wanted.given
        if wanted.json_schema is None:
            raise RequestError("response_format.json_schema is missing; give it.", param="response_format.json_schema")
        return wanted.json_schema.given
    return wanted.given or {"type": "object"} if wanted.type == "json_object" else None


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates take them: content is text, arguments are objects, and a tool's answer says whose it is."""
    told: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if message.content is None and message.role != "assistant":
            wanted = "text, or a list of parts of type text"
            raise RequestError(f"{place}.content is null; it must be {wanted}.", param=f"{place}.content")
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": message.content or ""}
        if message.reasoning_content is not None:
            turn["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            turn["tool_calls"] = [_call(each, f"{place}.tool_calls[{n}]") for n, each in enumerate(message.tool_calls)]
            names |= {each.id: each.function.name for each in message.tool_calls}
        if message.role == "tool":
            if message.tool_call_id is None:
                raise RequestError(f"{place}.tool_call_id is missing; give it.", param=f"{place}.tool_call_id")
            turn |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id, "")}
        told.append(turn)
    return told


def _call(call: ToolCall, place: str) -> dict[str, Any]:
    """A call of the history. Its arguments are JSON that a model once wrote."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        name = f"{place}.function.arguments"
        raise RequestError(f"{name} isn't an object in JSON; it must be one.", param=name)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _refuse_many(body: Mapping[str, Any]) -> None:
    """Raise RequestError where there are more tools, calls or parts than any chat has: to check each takes 20 us, in
    which nobody else is served.
    """
    tools = body.get("tools")
    if isinstance(tools, list) and len(tools) > MOST_TOOLS:
        raise RequestError(f"tools has {len(tools):,}; it may have {MOST_TOOLS}.", param="tools")
    messages, calls = body.get("messages"), 0
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        own = (message.get("tool_calls"), message.get("content")) if isinstance(message, dict) else (None, None)
        made, parts = (len(each) if isinstance(each, list) else 0 for each in own)
        calls += made
        for name, count in (("tool_calls", calls), ("content", parts)):
            if count > MOST_MESSAGES:
                place = f"messages[{i}].{name}"
                raise RequestError(f"{place} has more than {MOST_MESSAGES:,}; send fewer.", param=place)


def _refuse_unsupported(body: Mapping[str, Any], read: set[str]) -> None:
    for name in body.keys() - read - _NOT_READ:
        if body[name] not in _ASKS_FOR_NOTHING.get(name, ()):
            raise RequestError(f"{name} isn't supported; leave it out.", param=name, code="unsupported")
