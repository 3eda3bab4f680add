"""A request body of OpenAI's chat or completions API as prompts and options.

Takes parsed untrusted JSON. An unsupported field is refused by name, unless its value is the default behaviour.
Fields left out (seed, maximum length) stay unset: server and batch have their own defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from longspec.requests.fields import RequestError, messages, named_options, shown, stops, typed
from longspec.sampling.parameters import PARAMETERS, without_idle

if TYPE_CHECKING:
    from longspec.engine.options import Options
    from longspec.text.prompt import Prompt

__all__ = ["CHAT", "COMPLETIONS", "MOST_STOPS", "Request", "read_request"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MOST_STOPS = 16

_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
"""Fields that aren't supported, with the values that are let through: clients send them, and they change nothing."""

_NOT_READ = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_NOT_READ |= {"parallel_tool_calls"}
"""Fields that change no text, whatever their value."""

_OURS = {*PARAMETERS, "stop_loops"}
_READ = {"model", "stream", "stream_options", "n", "stop", "max_tokens", *_OURS}
_READ_IN_CHATS = {"messages", "max_completion_tokens", "reasoning_effort", "reasoning_budget"}


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
    _refuse_unsupported(body, _READ | (_READ_IN_CHATS if chat else {"prompt"}))
    stream, stream_options = typed(body, "stream", bool, False), typed(body, "stream_options", dict, {})
    if stream_options and not stream:
        raise RequestError("stream_options is for streams; set stream to true too.", param="stream_options")
    choices = typed(body, "n", int, 1)
    if choices < 1:
        raise RequestError(f"n is {choices}; it must be 1 or more.", param="n")
    return Request(
        chat=chat,
        prompts=(messages(body),) if chat else _prompts(body),
        options=_options(body, chat),
        choices=choices,
        stream=stream,
        include_usage=typed(stream_options, "include_usage", bool, False),
        model=typed(body, "model", str, None),
    )


def _options(body: Mapping[str, Any], chat: bool) -> Options:
    options = without_idle(named_options({name: body.get(name) for name in _OURS}))
    if options.get("top_p") == 1:
        del options["top_p"]  # 1 means all tokens: many clients send it without wanting sampling
    most = typed(body, "max_tokens", int, None)
    if chat:
        most = typed(body, "max_completion_tokens", int, most)
        options["effort"] = typed(body, "reasoning_effort", str, None)
        options["reasoning_budget"] = typed(body, "reasoning_budget", int, None)
    options["max_new_tokens"] = most
    if "stop" in body:
        options["stop"] = stops(body, MOST_STOPS)
    named = {name: value for name, value in options.items() if value is not None}
    return cast("Options", named if chat else {**named, "raw": True})


def _prompts(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("prompt")
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError(f"prompt is {shown(value)}; it must be a text, or a list of texts.", param="prompt")
    return tuple(prompts)


def _refuse_unsupported(body: Mapping[str, Any], read: set[str]) -> None:
    for name in body.keys() - read - _NOT_READ:
        if body[name] not in _ASKS_FOR_NOTHING.get(name, ()):
            raise RequestError(f"{name} isn't supported; leave it out.", param=name, code="unsupported")
