"""Request parsing: the bodies of OpenAI's API, and of `longspec run` over its socket, as prompts and options.

Takes untrusted JSON; gives prompts and options of the right types, with the server's defaults.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from longspec.engine.options import Options
from longspec.requests.fields import OPTIONS, RequestError, named_options, stops, typed
from longspec.requests.openai import MOST_STOPS, read_request
from longspec.text.prompt import Prompt

__all__ = ["Ask", "ask", "local"]

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


def local(body: Mapping[str, Any]) -> tuple[str, Options, float | None]:
    """Parse a request of `longspec run`: the prompt, its options, and when it began on `perf_counter`'s clock."""
    options = {name: value for name, value in typed(body, "options", dict, {}).items() if value is not None}
    known = {"stop", *OPTIONS} - ({"allow_special_tokens"} if options.get("allow_special_tokens") else set())
    if unknown := sorted(options.keys() - known):
        raise RequestError(f"{unknown[0]} isn't known to this server.", param=unknown[0])
    stops(options, MOST_STOPS)
    return typed(body, "prompt", str), named_options(options), typed(body, "began", float, None)
