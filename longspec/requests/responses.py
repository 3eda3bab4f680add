"""OpenAI's Responses API: its bodies as bodies of a chat, and its responses and events.

Takes parsed untrusted JSON, answers and commits; gives dicts. Nothing is stored: a request brings its whole history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from longspec.requests.fields import RequestError, shown, typed
from longspec.requests.replies import Event, call_id, statistics, usage
from longspec.requests.translated import kinds, objects, refuse_others, renamed

if TYPE_CHECKING:
    from longspec.engine.answer import Answer
    from longspec.types import Commit

__all__ = ["RESPONSES", "ResponsesReply", "chat_body"]

RESPONSES = "/v1/responses"

_NAMES = {
    **{name: name for name in ("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "longspec")},
    "max_output_tokens": "max_completion_tokens",
    "parallel_tool_calls": "parallel_tool_calls",
    "repetition_penalty": "repetition_penalty",
    "reasoning_budget": "reasoning_budget",
}
_NOT_READ = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
_NOT_READ |= {"include", "truncation", "client_metadata", "prompt_cache_retention"}
_READ = {*_NAMES, *_NOT_READ, "input", "instructions", "tools", "tool_choice", "text", "reasoning"}
_IDLE: dict[str, Sequence[Any]] = {"background": (False,), "top_logprobs": (0,), "max_tool_calls": ()}
_TEXTS = ("input_text", "output_text", "text")


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat that a body asks for.

    Raises:
        RequestError: a field isn't supported, or isn't what it should be.
    """
    refuse_others(body, _READ, _IDLE)
    messages = list(_messages(body.get("input")))
    if (instructions := typed(body, "instructions", str, None)) is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    chat = {**renamed(body, _NAMES), "messages": messages}
    if body.get("tools") is not None:
        chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(objects(body["tools"], "tools"))]
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    if choice is not None:
        chat["tool_choice"] = choice
    reasoning = typed(body, "reasoning", dict, {})
    if reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    held = typed(typed(body, "text", dict, {}), "format", dict, {}, place="text")
    if held:
        kind = held.get("type")
        chat["response_format"] = {"type": kind, **({"json_schema": held} if kind == "json_schema" else {})}
    return chat


def _messages(given: object) -> Iterator[dict[str, Any]]:
    """A chat's messages of input items: calls in a row belong to one turn, with the text before them."""
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    turn: dict[str, Any] | None = None  # the assistant's, while it is collected
    for i, item in enumerate(objects(given, "input")):
        place, kind = f"input[{i}]", item.get("type", "message")
        is_own = kind in ("function_call", "reasoning") or (kind == "message" and item.get("role") == "assistant")
        if is_own:
            turn = turn or {"role": "assistant", "content": ""}
            _add(turn, item, kind, place)
            continue
        if turn is not None:
            yield turn
            turn = None
        if kind == "message":
            yield {"role": item.get("role"), "content": _text(item.get("content"), f"{place}.content")}
        elif kind == "function_call_output":
            output = _text(item.get("output"), f"{place}.output")
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
        else:
            raise RequestError(
                f"{place}.type is {shown(kind)}; it must be message, reasoning, function_call or function_call_output.",
                param=f"{place}.type",
            )
    if turn is not None:
        yield turn


def _add(turn: dict[str, Any], item: Mapping[str, Any], kind: str, place: str) -> None:
    if kind == "message":
        turn["content"] += _text(item.get("content"), f"{place}.content")
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})
    elif item.get("content"):
        thoughts = kinds(item["content"], f"{place}.content", ("reasoning_text", "text"))
        turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(part["text"] for part in thoughts)


def _text(content: object, name: str) -> str:
    return "".join(part["text"] for part in kinds(content, name, _TEXTS))


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise RequestError(
            f"{place}.type is {shown(kind)}; only functions are supported, as nothing is run here.",
            param=f"{place}.type",
        )
    return {"type": kind, "function": {name: value for name, value in tool.items() if name != "type"}}


class ResponsesReply:
    """A response of one answer."""

    done = b""

    def __init__(self, created: int, model: str) -> None:
        self._head = {"id": f"resp_{uuid4().hex}", "object": "response", "created_at": created, "model": model}
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def whole(self, answers: Sequence[Answer], seeds: Sequence[int | None], choices: int) -> dict[str, Any]:
        [answer], [seed] = answers, seeds
        items = []
        if answer.reasoning:
            items.append(_filled(_item("reasoning"), answer.reasoning))
        if answer.text or not answer.calls:
            items.append(_filled(_item("message"), answer.text))
        items += [_filled(_item("function_call", call.name), call.arguments) for call in answer.calls]
        return self._response(items, answer, seed)

    def begins(self, prompts: Sequence[int]) -> Iterator[Event]:
        response = {**self._head, "status": "in_progress", "output": [], "usage": None, "error": None}
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, {"response": {**response, "incomplete_details": None}})

    def piece(self, index: int, commit: Commit) -> Iterator[Event]:
        if commit.thought:
            yield from self._text("reasoning", commit.thought)
        if commit.said:
            yield from self._text("message", commit.said)
        for part in commit.calls:
            if part.name:
                yield from self._begin("function_call", part.name)
            if part.arguments:
                yield from self._more(part.arguments)

    def ends(self, index: int, answer: Answer, seed: int | None) -> Iterator[Event]:
        if not self._items:
            yield from self._begin("message")
        yield from self._end()
        response = self._response(self._items, answer, seed)
        yield self._event(f"response.{response['status']}", {"response": response})

    def closes(self, answers: Sequence[Answer], choices: int) -> Iterator[Event]:
        yield from ()

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self._begin(kind)
        yield from self._more(text)

    def _begin(self, kind: str, name: str = "") -> Iterator[Event]:
        yield from self._end()
        self._open = item = _item(kind, name)
        self._items.append(item)
        yield self._event("response.output_item.added", {**self._place, "item": {**item, "status": "in_progress"}})
        if kind != "function_call":
            yield self._event("response.content_part.added", {**self._within, "part": _part(kind, "")})

    def _more(self, text: str) -> Iterator[Event]:
        item = self._open
        assert item is not None
        item["_text"] = item.get("_text", "") + text
        yield self._event(f"response.{_STREAMED[item['type']]}.delta", {**self._within, "delta": text})

    def _end(self) -> Iterator[Event]:
        """Complete the item that is open."""
        if (item := self._open) is None:
            return
        kind, text, within = item["type"], item.pop("_text", ""), self._within
        _filled(item, text)
        name = "arguments" if kind == "function_call" else "text"
        yield self._event(f"response.{_STREAMED[kind]}.done", {**within, name: text})
        if kind != "function_call":
            yield self._event("response.content_part.done", {**within, "part": _part(kind, text)})
        yield self._event("response.output_item.done", {**self._place, "item": item})
        self._open = None

    @property
    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._items) - 1}

    @property
    def _within(self) -> dict[str, Any]:
        assert self._open is not None
        more = {} if self._open["type"] == "function_call" else {"content_index": 0}
        return {"item_id": self._open["id"], **self._place, **more}

    def _event(self, kind: str, content: Mapping[str, Any]) -> Event:
        self._number += 1
        return kind, {"type": kind, "sequence_number": self._number - 1, **content}

    def _response(self, items: list[dict[str, Any]], answer: Answer, seed: int | None) -> dict[str, Any]:
        is_whole, counts = answer.finish_reason == "stop", usage([answer], 1)
        return {
            **self._head,
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "error": None,
            "output": items,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": counts["completion_tokens_details"],
                "total_tokens": counts["total_tokens"],
            },
            "longspec": statistics(answer, seed),
        }


_STREAMED = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}


def _item(kind: str, name: str = "") -> dict[str, Any]:
    """An item of the output, without its text."""
    if kind == "function_call":
        return {"id": f"fc_{call_id()}", "type": kind, "call_id": call_id(), "name": name, "arguments": ""}
    if kind == "reasoning":
        return {"id": f"rs_{call_id()}", "type": kind, "summary": [], "content": []}
    return {"id": f"msg_{call_id()}", "type": kind, "role": "assistant", "content": []}


def _filled(item: dict[str, Any], text: str) -> dict[str, Any]:
    """The item with its text, completed."""
    item["status"] = "completed"
    if item["type"] == "function_call":
        item["arguments"] = text
    else:
        item["content"] = [_part(item["type"], text)]
    return item


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
