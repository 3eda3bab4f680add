"""What an engine and its texts may be asked for: the options' names, what `auto` stands for, what is refused.

Takes options as they were given; loads nothing, so that what is wrong is said before a model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from longspec.cache import BLOCK, CACHES
from longspec.constraints.grammar import grammar_of
from longspec.constraints.thinking_budget import held
from longspec.drafters.auto import auto
from longspec.drafters.spec import parse
from longspec.engine.session import Session
from longspec.errors import BudgetError, ContextError, UsageError
from longspec.model.load import Model
from longspec.sampling.parameters import PARAMETERS, SamplingOptions
from longspec.text.prompt import Prompt, encode
from longspec.text.reasoning_effort import variables
from longspec.text.repetition import Loops
from longspec.text.tokenizer import Vocabulary
from longspec.types import Drafter

__all__ = [
    "Options",
    "asked",
    "check",
    "check_options",
    "check_tokens",
    "drafter_options",
    "guidance",
    "kind",
    "most_tokens",
    "tokens_of",
]


class Options(SamplingOptions, total=False):
    """How one text is written. Sampling left open comes from the checkpoint's generation config, else it is greedy."""

    prompt_cache: str | Path | None  # a file that keeps the prompt's rows: read if it is there, written after prefill
    after: Session | None  # a text that is over, whose cache this one takes as far as both begin alike
    system: str | None  # a system message before the prompt
    raw: bool  # the prompt as it is, without the chat template
    key: str  # names the text in the noise of its sampling
    max_new_tokens: int | None  # None: up to the end of text, or of the model's context
    stop: str | Sequence[str]
    json_schema: str | Path | Mapping[str, Any] | None  # what the answer is held to: a schema, its JSON or its file
    regex: str | None  # or a regular expression, for the whole of it
    reasoning_budget: int | None  # tokens of reasoning, after which the section is ended and the answer follows
    effort: str | None  # how much to think, one of reasoning_effort.EFFORTS; the chat template has to know it
    stop_loops: bool  # end an answer that only repeats itself


def kind(cache: str, all_rows: bool) -> str:
    """The name in CACHES."""
    return f"{cache} --all-rows" if all_rows else cache


def drafter_options(
    draft_model: object = None,
    skip_set: object = None,
    draft_from: Sequence[str | Path] = (),
    remember: bool = False,
) -> dict[str, Any]:
    """Options of drafters as `longspec.drafters.spec.parse` takes them, of those that `Engine.load` has a word for."""
    given = {"draft": draft_model, "set": skip_set, "texts": tuple(draft_from), "remember": remember}
    return {name: value for name, value in given.items() if value not in (None, (), False)}


def check(
    drafter: str | Drafter, cache: str, all_rows: bool, draft_tokens: int, options: Mapping[str, Any] | None = None
) -> None:
    """options: those of drafters. Raises UsageError: a name isn't known, or options don't go together."""
    if drafter == "auto":
        auto(options or {})
    elif isinstance(drafter, str):
        parse(drafter, {name: value for name, value in (options or {}).items() if name != "set"})
    if cache != "auto" and cache not in (names := [name for name in CACHES if " " not in name]):
        raise UsageError(f"The cache {cache!r} is not known; use auto or one of: {', '.join(names)}.")
    if all_rows and f"{cache} --all-rows" not in CACHES:
        raise UsageError(
            f"--all-rows is for the caches offload and disk, and the cache is {cache}; add --cache disk or "
            "--cache offload, or leave --all-rows out."
        )
    if not 1 <= draft_tokens <= BLOCK:
        raise UsageError(
            f"num_speculative_tokens is {draft_tokens}; it must be 1 to {BLOCK} (--drafter none bets on nothing)."
        )


def most_tokens(prompt: int, asked: int | None, context: int, planned: int | None) -> int:
    """How many tokens prompt and answer may have together; planned: those that a memory plan is for.

    Raises:
        ContextError: the model's context is too short.
        BudgetError: the plan is for fewer.
    """
    planned = context if planned is None else planned
    if prompt >= context:
        raise ContextError(f"The prompt has {prompt} tokens; the model's context for prompt and answer is {context}.")
    if prompt >= planned:
        raise BudgetError(f"The prompt has {prompt} tokens; the memory was planned for {planned} with the answer.")
    if asked is None:
        return min(planned, context)
    if asked < 1:
        raise UsageError(f"max_new_tokens is {asked}; it must be 1 or more.")
    if prompt + asked > context:
        raise ContextError(
            f"The prompt has {prompt} tokens and {asked} new ones were asked for, {prompt + asked} together; "
            f"the model's context is {context}."
        )
    if prompt + asked > planned:
        raise BudgetError(
            f"The prompt has {prompt} tokens and {asked} new ones were asked for, {prompt + asked} together; "
            f"the memory was planned for {planned}."
        )
    return prompt + asked


def check_options(options: Mapping[str, Any]) -> None:
    """Raises TypeError, as a function's own keywords do: a name isn't one of `Options`. The nearest one is said."""
    for name in options:
        if name not in Options.__annotations__:
            near = get_close_matches(name, Options.__annotations__, 1)
            raise TypeError(
                f"{name!r} is not an option of a text"
                + (f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(Options.__annotations__)}.")
            )


def tokens_of(vocabulary: Vocabulary, prompt: Prompt, options: Options) -> list[int]:
    """The tokens of a prompt that is asked with these options.

    Raises:
        UsageError: it has none, or the options make no sense with it.
    """
    told = variables(vocabulary, options.get("effort"))
    return encode(vocabulary, prompt, options.get("system"), raw=options.get("raw", False), variables=told)


def check_tokens(tokens: Sequence[int], rows: int) -> None:
    """Raises UsageError where one isn't a row of the model's embedding table, which has so many."""
    wrong = next((token for token in tokens if not 0 <= token < rows), None)
    if wrong is not None:
        raise UsageError(
            f"The prompt has the token {wrong}, and the model's embedding table has {rows:,} rows (0 to {rows - 1}): "
            "its tokenizer knows more tokens than the model was made for; leave that token's text out."
        )


def guidance(model: Model, tokens: Sequence[int], options: Options) -> dict[str, Any]:
    """What a session with this prompt is told of its answer: what it is held to, and what is seen in it.

    Raises:
        UsageError: the options make no sense together, or with this model.
    """
    section, constraint = held(
        model.vocabulary,
        tokens,
        raw=options.get("raw", False),
        budget=options.get("reasoning_budget"),
        grammar=grammar_of(options.get("json_schema"), options.get("regex")),
        size=model.decoder.config.vocabulary,
        end_tokens=model.end_tokens,
    )
    return {"section": section, "constraint": constraint, "loops": Loops() if options.get("stop_loops") else None}


def asked(options: Options) -> dict[str, Any]:
    """The sampling parameters that were named, without those that are left open."""
    return {name: value for name, value in options.items() if name in PARAMETERS and value is not None}
