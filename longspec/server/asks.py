"""Request parsing: the bodies of OpenAI's API, and of `longspec run` over its socket, as prompts and options.

Takes untrusted JSON; gives prompts and options of the right types, with the server's defaults.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from longspec.engine.options import Options
from longspec.requests.fields import OPTIONS, RequestError, messages, named_options, parse_object, stops, typed
from longspec.requests.openai import MOST_STOPS, read_request
from longspec.text.prompt import Prompt

__all__ = ["Ask", "ask", "local", "scored"]

_MOST_SCORED = 64
_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat has no limit


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its prompts with their options, and the response format."""

    chat: bool
    texts: tuple[tuple[Prompt, Options], ...]  # `choices` of them per prompt
    choices: int
    stream: bool
    include_usage: bool
    model: str | None  # as it was named

    @property
    def seeds(self) -> list[int | None]:
        return [options.get("seed") for _, options in self.texts]


def ask(body: Mapping[str, Any], most: int, *, chat: bool, allow_special_tokens: bool = False) -> Ask:
    """Parse a request to /v1/chat/completions or /v1/completions, for at most `most` answers.

    allow_special_tokens: the server was started so; no request can ask for it.

    Raises:
        RequestError: a field isn't supported, or isn't what it should be.
    """
    request = read_request(body, chat=chat)
    choices, prompts = request.choices, request.prompts
    if choices * len(prompts) > most:
        asked = f"{len(prompts)} prompts with {choices} choices" if len(prompts) > 1 else f"{choices} choices"
        raise RequestError(f"{asked} are more texts than this server takes; it takes {most} together.", param="n")
    # A repeated request gets another answer, unless it sets the seed; the response's longspec.seed names the one
    # used.
    options: dict[str, Any] = {"seed": secrets.randbits(32), **request.options}
    if allow_special_tokens:
        options["allow_special_tokens"] = True
    if not chat:
        options.setdefault("max_new_tokens", _COMPLETION_TOKENS)
    # The first answer has the key of `longspec run`; each other answer has its own noise.
    repeated = (prompt for prompt in prompts for _ in range(choices))
    texts = [(prompt, cast(Options, {**options, "key": str(i) if i else ""})) for i, prompt in enumerate(repeated)]
    return Ask(chat, tuple(texts), choices, request.stream, request.include_usage, request.model)


def local(body: Mapping[str, Any]) -> tuple[Prompt, Options, float | None]:
    """Parse a request of `longspec run` or `chat`: the prompt or messages, the options, and when it began on
    `perf_counter`'s clock.
    """
    options = {name: value for name, value in typed(body, "options", dict, {}).items() if value is not None}
    known = {"stop", "key", "json_schema", "regex", *OPTIONS}
    known -= {"allow_special_tokens"} if options.get("allow_special_tokens") else set()
    if unknown := sorted(options.keys() - known):
        raise RequestError(f"{unknown[0]} isn't known to this server.", param=unknown[0])
    stops(options, MOST_STOPS)
    prompt: Prompt = messages(body) if "messages" in body else typed(body, "prompt", str)
    own: dict[str, Any] = {**named_options(options), "key": typed(options, "key", str, "")}
    if "json_schema" in options:  # its JSON, never a file's name
        own["json_schema"] = parse_object(typed(options, "json_schema", str), "json_schema")
    if "regex" in options:
        own["regex"] = typed(options, "regex", str)
    return prompt, cast(Options, own), typed(body, "began", float, None)


def scored(body: Mapping[str, Any]) -> list[tuple[Prompt, str]]:
    """Parse a request for scores of `longspec command`: pairs of messages and the text behind them."""
    pairs = typed(body, "pairs", list)
    if len(pairs) > _MOST_SCORED or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RequestError(f"pairs must be {_MOST_SCORED} or fewer lists of messages and a text.", param="pairs")
    return [(messages({"messages": given}), typed({"text": text}, "text", str)) for given, text in pairs]
