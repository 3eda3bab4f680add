"""What an engine and its texts may be asked for: the options' names, what `auto` stands for, what is refused.

Takes options as they were given; loads nothing, so that what is wrong is said before a model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from longspec.cache import BLOCK, CACHES
from longspec.drafters import check as check_drafter
from longspec.errors import UsageError

__all__ = ["DRAFT_TOKENS", "Options", "asked", "check", "drafters", "kind"]

DRAFT_TOKENS = 8
"""Tokens drafted at most, if nobody says otherwise: nine rows cost a bf16 pass what one costs (16.9 and 16.4 ms)."""


class Options(TypedDict, total=False):
    """How one text is written. Sampling left open comes from the checkpoint's generation config, else it is greedy."""

    prompt_cache: str | Path | None  # a file that keeps the prompt's rows: read if it is there, written after prefill
    system: str | None  # a system message before the prompt
    raw: bool  # the prompt as it is, without the chat template
    key: str  # names the text in the noise of its sampling
    max_new_tokens: int | None  # None: up to the end of text, or of the model's context
    stop: str | Sequence[str]
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


def kind(cache: str, all_rows: bool) -> str:
    """The name in CACHES."""
    return f"{cache} --all-rows" if all_rows else cache


def drafters(name: str, *, draft_model: bool) -> tuple[str, ...]:
    """The names in DRAFTERS that this one stands for; of several, each step takes the one that promises most."""
    if name != "auto":
        return (name,)
    return ("model+ngram",) if draft_model else ("ngram",)


def check(drafter: str, cache: str, all_rows: bool, draft_tokens: int, *, draft_model: bool) -> None:
    """Raises UsageError: a name isn't known, or options don't go together."""
    for name in drafters(drafter, draft_model=draft_model):
        check_drafter(name, draft_model=draft_model)
    if cache != "auto" and cache not in (names := [name for name in CACHES if " " not in name]):
        raise UsageError(f"The cache {cache!r} is not known; use auto or one of: {', '.join(names)}.")
    if all_rows and f"{cache} --all-rows" not in CACHES:
        raise UsageError(f"--all-rows is for the caches offload and disk; the cache is {cache}.")
    if not 1 <= draft_tokens <= BLOCK:
        raise UsageError(
            f"num_speculative_tokens is {draft_tokens}; it must be 1 to {BLOCK} (--drafter none bets on nothing)."
        )


def asked(options: Options) -> dict[str, Any]:
    """What was said of sampling."""
    return {name: value for name, value in options.items() if name in _SAMPLING and value is not None}


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
