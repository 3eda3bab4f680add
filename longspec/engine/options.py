"""The options of an engine and its sequences: their names, what `auto` resolves to, which combinations are refused.

Takes options as given; loads nothing, so that an invalid option is reported before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from longspec.cache import BLOCK, CACHES
from longspec.calls.toolbox import Toolbox
from longspec.constraints.grammar import checked, grammar_of
from longspec.constraints.json_schema import prepared
from longspec.constraints.thinking_budget import held
from longspec.drafters.auto import auto
from longspec.drafters.spec import parse
from longspec.engine.session import Session
from longspec.errors import BudgetError, ContextError, UsageError
from longspec.machine.declared import check_names, hold, kind_of
from longspec.machine.schema import Kind
from longspec.model.load import Model
from longspec.sampling.parameters import NUMBERS, PARAMETERS, SamplingOptions
from longspec.sampling.processors import Processor, biased, checked_bias
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
    """The options of one answer. Sampling parameters left out come from the checkpoint's generation config, else
    greedy.
    """

    prompt_cache: str | Path | None  # file of the prompt's cached rows: read if it exists, written after prefill
    after: Session | None  # a finished session, whose cache is reused for the common prefix
    system: str | None  # a system message before the prompt
    raw: bool  # no chat template
    allow_special_tokens: bool  # messages may hold special tokens; else what they hold is plain text
    key: str  # key of the sequence's sampling noise
    max_new_tokens: int | None  # None: until end of text or the model's context
    stop: str | Sequence[str]
    json_schema: str | Path | Mapping[str, Any] | type | None  # a schema, its JSON or file, or a pydantic class
    regex: str | None  # constrains the whole answer
    reasoning_budget: int | None  # tokens of reasoning, after which the section is closed and the answer follows
    effort: str | None  # reasoning effort, one of reasoning_effort.EFFORTS; needs a chat template that takes it
    stop_loops: bool  # end an answer that repeats itself
    tools: Sequence[Mapping[str, Any]] | None  # functions that the model may call, in OpenAI's format
    tool_choice: str | None  # auto, if left out; none, required, or the name of the tool that is to be called
    parallel_calls: bool  # several calls in one answer; true if left out
    drafter: str | None  # none, or one of the engine's; its control chooses, if left out
    logit_bias: Mapping[int, float] | None  # added to tokens' logits
    logprobs: int | None  # tell each token's log-probability, and those of so many likeliest tokens
    processors: Sequence[Processor] | None  # change the logits, after penalties and bias


def kind(cache: str, all_rows: bool) -> str:
    """The cache's name in CACHES."""
    return f"{cache} --all-rows" if all_rows else cache


def drafter_options(
    draft_model: object = None,
    skip_set: object = None,
    draft_from: Sequence[str | Path] = (),
    remember: bool = False,
) -> dict[str, Any]:
    """The drafters' options that are keywords of `Engine.load`, as `longspec.drafters.spec.parse` takes them."""
    given = {"draft": draft_model, "set": skip_set, "texts": tuple(draft_from), "remember": remember}
    return {name: value for name, value in given.items() if value not in (None, (), False)}


def check(
    drafter: str | Drafter,
    cache: str,
    all_rows: bool,
    draft_tokens: int | None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check an engine's options. draft_tokens: the usual number if None. options: the drafters' options. Raises
    UsageError: an unknown name, or options that conflict.
    """
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
    if draft_tokens is not None and not 1 <= draft_tokens <= BLOCK:
        raise UsageError(
            f"num_speculative_tokens is {draft_tokens}; it must be 1 to {BLOCK} (--drafter none bets on nothing)."
        )


def most_tokens(prompt: int, asked: int | None, context: int, planned: int | None) -> int:
    """The maximum of prompt and answer together, in tokens. planned: the tokens of the memory plan, if there is one.

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
    """Hold options to their types in `Options` and their bounds in `NUMBERS`; None is an option that is left out.

    Raises:
        UsageError: a value isn't what its option takes.
        TypeError: a name isn't an option; the nearest one is named.
    """
    check_names(options, Options.__annotations__, "a text")
    for name, value in options.items():
        if value is not None and name in NUMBERS:
            NUMBERS[name].check(name, value)
        elif value is not None:
            hold(name, value, _kinds()[name])


@cache
def _kinds() -> Mapping[str, Kind]:
    return {name: kind_of(hint) for name, hint in get_type_hints(Options).items()}


def tokens_of(vocabulary: Vocabulary, prompt: Prompt, options: Options, room: int | None = None) -> list[int]:
    """The tokens of a prompt, rendered with these options.

    Raises:
        ContextError: its text is too long to have at most `room` tokens (any number, if None), whatever they are.
        UsageError: it has none, or the options make no sense with it.
    """
    told, system = variables(vocabulary, options.get("effort")), options.get("system")
    if (tools := toolbox(vocabulary, options)) is not None:
        told["tools"] = tools.told
    raw, allow = options.get("raw", False), options.get("allow_special_tokens", False)
    tokens = encode(vocabulary, prompt, system, raw=raw, variables=told, allow_special=allow, room=room)
    markers = vocabulary.markers
    held = any(options.get(name) is not None for name in ("json_schema", "regex")) or (
        tools is not None and tools.is_held
    )
    if held and not raw and markers is not None and markers.lead:  # its thoughts come first; no template opens them
        tokens += vocabulary.encode(markers.begin, add_special=False)
    return tokens


def check_tokens(tokens: Sequence[int], rows: int) -> None:
    """Raise UsageError where a token id is outside the model's embedding table of `rows` rows."""
    wrong = next((token for token in tokens if not 0 <= token < rows), None)
    if wrong is not None:
        raise UsageError(
            f"The prompt has the token {wrong}, and the model's embedding table has {rows:,} rows (0 to {rows - 1}): "
            "its tokenizer knows more tokens than the model was made for; leave that token's text out."
        )


def guidance(model: Model, tokens: Sequence[int], options: Options) -> dict[str, Any]:
    """A session's constraint (grammar, thinking budget), reasoning parser and loop detector, as keywords of
    `Session`.

    Raises:
        UsageError: the options make no sense together, or with this model.
    """
    schema, tools = options.get("json_schema"), toolbox(model.vocabulary, options)
    rules = None if tools is None else tools.grammar(prepared, schema)
    section, constraint = held(
        model.vocabulary,
        tokens,
        raw=options.get("raw", False),
        budget=options.get("reasoning_budget"),
        grammar=grammar_of(schema, options.get("regex")) if rules is None else checked(rules),
        size=model.decoder.config.vocabulary,
        end_tokens=model.end_tokens,
        lead=rules is None,
    )
    bias = checked_bias(options.get("logit_bias") or {}, model.decoder.config.vocabulary)
    return {
        "section": section,
        "constraint": constraint,
        "reader": None if tools is None else tools.reader(),
        "loops": Loops() if options.get("stop_loops") else None,
        "processors": [*([biased(bias)] if bias else []), *(options.get("processors") or ())],
        "logprobs": options.get("logprobs"),
        "parse": getattr(schema, "model_validate_json", None),
    }


def toolbox(vocabulary: Vocabulary, options: Options) -> Toolbox | None:
    """The tools that may be called; None where there are none, or none may be.

    Raises:
        UsageError: a tool isn't one, or the model's chat template takes none.
    """
    tools, choice = options.get("tools"), options.get("tool_choice") or "auto"
    if not tools:
        if choice not in ("auto", "none"):
            raise UsageError(f"tool_choice is {choice!r}, and there are no tools; give tools too.")
        return None
    if options.get("raw"):
        raise UsageError("A raw prompt has no chat template that tools could be told; leave tools or raw out.")
    if options.get("regex"):
        raise UsageError("Tools and a regular expression are both given; an answer with calls can't be held to it.")
    box = Toolbox.of(vocabulary.calls, tools, choice, options.get("parallel_calls", True))
    return None if choice == "none" else box


def asked(options: Options) -> dict[str, Any]:
    """The sampling parameters that the caller set explicitly."""
    return {name: value for name, value in options.items() if name in PARAMETERS and value is not None}
