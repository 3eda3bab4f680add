"""What is asked: a body of OpenAI's API, or of `longspec run`, as texts to be written.

Takes JSON from strangers; gives prompts and options of the right types. Ranges are the engine's to check. What isn't
supported is refused by name, unless it is the default and asks for nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from longspec.engine.options import Options
from longspec.server.replies import RefusedError
from longspec.text.prompt import Prompt

__all__ = ["Ask", "ask", "local", "parsed"]

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on to its end
_MOST_STOPS = 16
_WANTED = 'send an object such as {"messages": [...]}.'

_IDLE: dict[str, tuple[Any, ...]] = {
    # What clients send although it asks for nothing: the values that are let through.
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
_NOTES = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that change no text; they are let through and not read."""

_READ = {"model", "stream", "stream_options", "n", "stop", "seed", "max_tokens", "stop_loops"}
_SAMPLED = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}
_CHAT = {"messages", "max_completion_tokens", "reasoning_effort", "reasoning_budget"}
_LOCAL: dict[str, type] = {
    **_SAMPLED,
    "seed": int,
    "max_new_tokens": int,
    "system": str,
    "raw": bool,
    "effort": str,
    "reasoning_budget": int,
    "stop_loops": bool,
}


@dataclass(frozen=True, slots=True)
class Ask:
    """The texts of one request, and how it wants them."""

    chat: bool
    texts: tuple[tuple[Prompt, Options], ...]  # `choices` of them for each prompt
    choices: int
    stream: bool
    include_usage: bool

    @property
    def seeds(self) -> list[int | None]:
        return [options.get("seed") for _, options in self.texts]


def parsed(data: bytes) -> dict[str, Any]:
    """The body as an object."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise RefusedError(400, "The body isn't JSON; " + _WANTED) from None
    if not isinstance(body, dict):
        raise RefusedError(400, f"The body is {_shown(body)}; {_WANTED}")
    return body


def ask(body: Mapping[str, Any], model: str, most: int, *, chat: bool) -> Ask:
    """A request to /v1/chat/completions, or to /v1/completions, for at most so many texts.

    Raises RefusedError: a field isn't supported, or isn't what it should be.
    """
    body = {name: value for name, value in body.items() if value is not None}
    _only_known(body, _CHAT if chat else {"prompt"})
    wanted = _typed(body, "model", str, model)
    if wanted != model:
        raise RefusedError(
            404, f"There is no model {wanted!r} here; this server has {model!r}.", code="model_not_found"
        )
    stream, after = _typed(body, "stream", bool, False), _typed(body, "stream_options", dict, {})
    if after and not stream:
        raise RefusedError(400, "stream_options is for streams; set stream to true too.", param="stream_options")
    choices = _typed(body, "n", int, 1)
    if choices < 1:
        raise RefusedError(400, f"n is {choices}; it must be 1 or more.", param="n")
    options = _options(body, chat)
    prompts: list[Prompt] = [_messages(body)] if chat else list(_prompts(body))
    if choices * len(prompts) > most:
        asked = f"{len(prompts)} prompts with {choices} choices" if len(prompts) > 1 else f"{choices} choices"
        raise RefusedError(400, f"{asked} are more texts than this server takes; it takes {most} together.", param="n")
    # The first text's key is that of `longspec run`; each other text has noise of its own.
    repeated = (prompt for prompt in prompts for _ in range(choices))
    texts = [(prompt, cast(Options, {**options, "key": str(i) if i else ""})) for i, prompt in enumerate(repeated)]
    return Ask(chat, tuple(texts), choices, stream, _typed(after, "include_usage", bool, False))


def local(body: Mapping[str, Any]) -> tuple[str, Options, float | None]:
    """What `longspec run` asks for: the prompt, its options, and when it began on this machine's clock."""
    given = {name: value for name, value in _typed(body, "options", dict, {}).items() if value is not None}
    if unknown := sorted(given.keys() - _LOCAL.keys() - {"stop"}):
        raise RefusedError(400, f"{unknown[0]} isn't known to this server.", param=unknown[0])
    options: dict[str, Any] = {name: _typed(given, name, kind) for name, kind in _LOCAL.items() if name in given}
    options["stop"] = _stops(given)
    return _typed(body, "prompt", str), cast(Options, options), _typed(body, "began", float, None)


def _options(body: Mapping[str, Any], chat: bool) -> Options:
    options: dict[str, Any] = {name: _typed(body, name, kind) for name, kind in _SAMPLED.items() if name in body}
    if options.get("temperature") == 0:  # greedy: the others have nothing to choose from
        options = {name: value for name, value in options.items() if name not in ("top_p", "top_k", "min_p")}
    if options.get("top_p") == 1:
        del options["top_p"]  # all tokens: said by many clients, and no wish for sampling
    options["stop_loops"] = _typed(body, "stop_loops", bool, False)
    most = _typed(body, "max_tokens", int, None)
    if chat:
        options["effort"] = _typed(body, "reasoning_effort", str, None)
        options["reasoning_budget"] = _typed(body, "reasoning_budget", int, None)
        most = _typed(body, "max_completion_tokens", int, most)
    elif most is None:
        most = _COMPLETION_TOKENS
    # Another request is to get another text, unless it names the seed; longspec.seed tells which it was.
    seed = _typed(body, "seed", int, None)
    seed = secrets.randbits(32) if seed is None else seed
    return cast(Options, options | {"max_new_tokens": most, "stop": _stops(body), "seed": seed, "raw": not chat})


def _messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = _typed(body, "messages", list)
    if not messages:
        raise RefusedError(400, "messages is empty; give at least one.", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RefusedError(
            400, f"{place} is {_shown(message)}; it must be an object with role and content.", param=place
        )
    role = _typed(message, "role", str, place=place)
    if role not in ("system", "developer", "user", "assistant"):
        said = f"{place}.role is {role!r}; it must be system, developer, user or assistant (tools aren't supported)."
        raise RefusedError(400, said, param=f"{place}.role")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_typed(part, "text", str, place=f"{place}.content") for part in content)
    if not isinstance(content, str):
        said = f"{place}.content is {_shown(content)}; it must be text, or a list of parts of type text."
        raise RefusedError(400, said, param=f"{place}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _prompts(body: Mapping[str, Any]) -> list[str]:
    given = body.get("prompt")
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise RefusedError(400, f"prompt is {_shown(given)}; it must be a text, or a list of texts.", param="prompt")
    return prompts


def _stops(body: Mapping[str, Any]) -> list[str]:
    given = body.get("stop") or []
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RefusedError(400, f"stop is {_shown(given)}; it must be a text, or a list of texts.", param="stop")
    if len(stops) > _MOST_STOPS:
        raise RefusedError(400, f"stop has {len(stops)} texts; it may have {_MOST_STOPS}.", param="stop")
    return stops


def _only_known(body: Mapping[str, Any], more: set[str]) -> None:
    for name in body.keys() - _READ - _SAMPLED.keys() - _NOTES - more:
        if body[name] not in _IDLE.get(name, ()):
            raise RefusedError(
                400, f"{name} isn't supported by this server; leave it out.", param=name, code="unsupported"
            )


_MISSING = object()
_KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _typed(body: Mapping[str, Any], name: str, kind: type, default: Any = _MISSING, *, place: str = "") -> Any:
    """A field of this type. A whole number is a number too; true and false are neither."""
    value: Any = body.get(name)
    named = f"{place}.{name}" if place else name
    if value is None:
        if default is _MISSING:
            raise RefusedError(400, f"{named} is missing; it must be {_KINDS[kind]}.", param=named)
        return default
    large = isinstance(value, int) and abs(value) >= 1 << 63
    if kind is float and type(value) is int and not large:
        return float(value)
    if type(value) is not kind or large:
        raise RefusedError(400, f"{named} is {_shown(value)}; it must be {_KINDS[kind]}.", param=named)
    return value


def _shown(value: object) -> str:
    said = json.dumps(value)
    return said if len(said) <= 60 else f"{said[:60]}..."
