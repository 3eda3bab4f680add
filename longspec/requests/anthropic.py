"""Anthropic's Messages API: its bodies as bodies of a chat, and its responses and events.

Takes parsed untrusted JSON, answers and commits; gives dicts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from longspec.requests.fields import RequestError, shown, typed
from longspec.requests.replies import Event, call_id, statistics
from longspec.requests.translated import kinds, objects, refuse_others, renamed

if TYPE_CHECKING:
    from longspec.engine.answer import Answer
    from longspec.types import Commit

__all__ = ["MESSAGES", "MessagesReply", "chat_body"]

MESSAGES = "/v1/messages"

_NAMES = {
    **{name: name for name in ("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "longspec")},
    "max_tokens": "max_completion_tokens",
    "stop_sequences": "stop",
    "repetition_penalty": "repetition_penalty",
}
_READ = {*_NAMES, "messages", "system", "tools", "tool_choice", "thinking", "metadata", "service_tier"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_USERS = ("text", "tool_result")
_OWN = ("text", "thinking", "redacted_thinking", "tool_use")


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat that a body asks for.

    Raises:
        RequestError: a field isn't supported, or isn't what it should be.
    """
    refuse_others(body, _READ, {})
    typed(body, "max_tokens", int)
    messages = [{"role": "system", "content": text}] if (text := _text(body.get("system") or "", "system")) else []
    for i, turn in enumerate(objects(body.get("messages"), "messages")):
        messages += _turn(turn, f"messages[{i}]")
    chat = {**renamed(body, _NAMES), "messages": messages}
    if body.get("tools") is not None:
        chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(objects(body["tools"], "tools"))]
    if choice := typed(body, "tool_choice", dict, {}):
        kind = choice.get("type")
        if kind not in ("tool", *_CHOICES):  # it may be a list, which no dict takes
            raise RequestError(
                f"tool_choice.type is {shown(kind)}; it must be auto, any, tool or none.", param="tool_choice"
            )
        named = {"type": "function", "function": {"name": choice.get("name")}}
        chat["tool_choice"] = named if kind == "tool" else _CHOICES[kind]
        chat["parallel_tool_calls"] = not typed(choice, "disable_parallel_tool_use", bool, False, place="tool_choice")
    thinking = typed(body, "thinking", dict, {})
    if thinking.get("type") == "enabled":
        chat["reasoning_budget"] = typed(thinking, "budget_tokens", int, place="thinking")
    elif thinking and thinking.get("type") not in ("disabled", "adaptive"):
        raise RequestError(
            f"thinking.type is {shown(thinking.get('type'))}; it must be enabled, disabled or adaptive.",
            param="thinking",
        )
    return chat


def _turn(turn: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The chat's messages of a turn: each tool's result is one of its own, before the user's text."""
    role = turn.get("role")
    if role == "assistant":
        blocks = kinds(turn.get("content"), f"{place}.content", _OWN)
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        told: dict[str, Any] = {"role": role, "content": text}
        if thoughts := [typed(block, "thinking", str) for block in blocks if block["type"] == "thinking"]:
            told["reasoning_content"] = "".join(thoughts)
        if calls := [_call(block) for block in blocks if block["type"] == "tool_use"]:
            told["tool_calls"] = calls
        return [told]
    if role not in ("user", "system"):
        raise RequestError(f"{place}.role is {shown(role)}; it must be user or assistant.", param=f"{place}.role")
    blocks = kinds(turn.get("content"), f"{place}.content", _USERS)
    messages: list[dict[str, Any]] = [
        {
            "role": "tool",
            "tool_call_id": block.get("tool_use_id"),
            "content": _text(block.get("content") or "", f"{place}.content"),
        }
        for block in blocks
        if block["type"] == "tool_result"
    ]
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    return [*messages, {"role": role, "content": "".join(texts)}] if texts or not messages else messages


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(block.get("input"), ensure_ascii=False)
    return {"id": block.get("id"), "type": "function", "function": {"name": block.get("name"), "arguments": arguments}}


def _text(content: object, name: str) -> str:
    return "".join(block["text"] for block in kinds(content, name, ("text",)))


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = tool.get("type", "custom")
    if kind != "custom":
        raise RequestError(
            f"{place}.type is {shown(kind)}; only custom tools are supported, as nothing is run here.",
            param=f"{place}.type",
        )
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    return {"type": "function", "function": renamed(tool, names)}


class MessagesReply:
    """A message of one answer."""

    done = b""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._count = 0
        self._open: str | None = None

    def whole(self, answers: Sequence[Answer], seeds: Sequence[int | None], choices: int) -> dict[str, Any]:
        [answer], [seed] = answers, seeds
        blocks = [{**_block("thinking"), "thinking": answer.reasoning}] if answer.reasoning else []
        if answer.text or not answer.calls:
            blocks.append({**_block("text"), "text": answer.text})
        blocks += [{**_block("tool_use", call.name), "input": _object(call.arguments)} for call in answer.calls]
        counts = {"usage": _usage(answer), "longspec": statistics(answer, seed)}
        return {**self._head, "content": blocks, **_reason(answer), **counts}

    def begins(self, prompts: Sequence[int]) -> Iterator[Event]:
        counts = {"input_tokens": prompts[0], "output_tokens": 0}
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": counts,
        }
        yield _event("message_start", message=message)

    def piece(self, index: int, commit: Commit) -> Iterator[Event]:
        if commit.thought:
            yield from self._text("thinking", {"type": "thinking_delta", "thinking": commit.thought})
        if commit.said:
            yield from self._text("text", {"type": "text_delta", "text": commit.said})
        for part in commit.calls:
            if part.name:
                yield from self._begin("tool_use", part.name)
            if part.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": part.arguments})

    def ends(self, index: int, answer: Answer, seed: int | None) -> Iterator[Event]:
        if not self._count:
            yield from self._begin("text")
        yield from self._end()
        yield _event("message_delta", delta=_reason(answer), usage=_usage(answer), longspec=statistics(answer, seed))
        yield _event("message_stop")

    def closes(self, answers: Sequence[Answer], choices: int) -> Iterator[Event]:
        yield from ()

    def _text(self, kind: str, delta: Mapping[str, Any]) -> Iterator[Event]:
        if self._open != kind:
            yield from self._begin(kind)
        yield self._delta(delta)

    def _begin(self, kind: str, name: str = "") -> Iterator[Event]:
        yield from self._end()
        self._open = kind
        self._count += 1
        yield _event("content_block_start", index=self._count - 1, content_block=_block(kind, name))

    def _delta(self, delta: Mapping[str, Any]) -> Event:
        return _event("content_block_delta", index=self._count - 1, delta=delta)

    def _end(self) -> Iterator[Event]:
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open is not None:
            yield _event("content_block_stop", index=self._count - 1)
        self._open = None


def _event(kind: str, **content: Any) -> Event:
    return kind, {"type": kind, **content}


def _block(kind: str, name: str = "") -> dict[str, Any]:
    if kind == "tool_use":
        return {"type": kind, "id": call_id(), "name": name, "input": {}}
    return {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}


def _object(arguments: str) -> Any:
    """A call's arguments; empty where the answer was cut within them."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return {}


def _usage(answer: Answer) -> dict[str, int]:
    cached = answer.usage["cached_tokens"]
    return {
        "input_tokens": answer.usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "output_tokens": answer.usage["completion_tokens"],
    }


def _reason(answer: Answer) -> dict[str, Any]:
    reason = "max_tokens" if answer.finish_reason != "stop" else "tool_use" if answer.calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}
