"""The memory plan: the bytes that a sequence will need, computed before any weight is loaded, and the cheapest choice
that fits.

Takes a model's config and weight footprint, and a sequence length; gives each choice's bytes by component, and the
first choice that fits, in this order:

    dense, int8, int4, then offload (on a GPU) and disk
    of each, the ways to draft, by the tokens per second that they promise (`gain`): sizes of trees, down to none;
    whether a draft model or a head is loaded that nobody asked for by name; texts side by side
    of each, prefill chunks of 512, 256, 128, 64 tokens
    on a CPU: the same with the layers' weights on disk, of which as many stay in memory as fit

A smaller chunk costs time before the first token only (measured: with chunks of 64, prefill takes half as long
again); another kind of cache costs time with every token, and its output may differ from dense's: so all chunks and all
ways to draft come before the next kind. It loads nothing and monitors nothing (`longspec.engine.memory_guard`).

On a CPU the bytes are the process's peak resident size; on a GPU torch's reserved memory, the host's being separate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from longspec.cache import LOSSLESS
from longspec.drafters import DRAFT_TOKENS
from longspec.drafters.auto import auto
from longspec.drafters.chosen import Limits
from longspec.drafters.spec import Spec, parse
from longspec.errors import BudgetError, UsageError
from longspec.heads.published.mtp import has_head
from longspec.machine.system import available_bytes, parse_bytes, resident_bytes, shown
from longspec.memory.choices import (
    CHUNKS,
    DRAFTS,
    LATER,
    STREAMED_DRAFT_TOKENS,
    WEIGHTS,
    Choice,
    Request,
    beside,
    choice,
    choices,
    filled,
    ring,
)
from longspec.model.load import CODED, DTYPES, Opened
from longspec.model.weights.footprint import footprint
from longspec.text.tokenizer import Vocabulary
from longspec.types import Drafter

__all__ = [
    "CHUNKS",
    "DRAFTS",
    "STREAMED_DRAFT_TOKENS",
    "Choice",
    "Plan",
    "Request",
    "alone",
    "budget_of",
    "check_weights",
    "choice",
    "choices",
    "filled",
    "make_plan",
    "on_disk",
    "plan",
    "request_of",
]

_STEADY = 4 << 20
"""What the process has is rounded up to this, so that the same command is planned alike every time."""

_POOL = 512 << 20
"""Bytes of experts where nothing bounds the memory."""

_AUTO = 0.9
"""Of what the machine has left, under `--memory auto`: others grow too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice for a sequence under a budget."""

    request: Request
    budget: int
    choice: Choice

    def __str__(self) -> str:
        c, texts = self.choice, self.choice.how.texts
        said = (
            f"{shown(c.need.total)} of {shown(self.budget)} planned for {self.request.tokens:,} tokens"
            f"{f' in each of {texts} texts' if self.request.texts > 1 else ''}: cache {c.cache}"
        )
        said += "" if c.cache in LOSSLESS else " (the text may differ from dense's)"
        said += "" if c.prefill_rows == CHUNKS[0] else f", prefill in chunks of {c.prefill_rows} rows"
        wanted = self.request.draft_tokens if c.kept is None else self.request.streamed_draft_tokens
        if c.draft_tokens < wanted:
            said += f", at most {c.draft_tokens} drafted tokens" if c.draft_tokens else ", without drafts"
        if c.draft_tokens and c.how.without:
            said += f", without {' and '.join(c.how.without)}"
        said += f", {texts:,} of {self.request.texts:,} texts side by side" if texts < self.request.texts else ""
        if c.kept is None:
            return said
        return f"{said}, {shown(c.streamed)} of weights read from disk for each pass"

    @property
    def spare(self) -> int:
        """Bytes of the budget that nothing is planned for."""
        return max(0, self.budget - self.choice.need.total)

    @property
    def limits(self) -> Limits:
        """What it leaves for drafters."""
        how, asked = self.choice.how, self.request
        drafts = bool(how.draft_tokens or not asked.draft_tokens)
        return Limits(drafts, how.without, asked.tokens * how.texts, self.spare)

    def report(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        c = self.choice
        return {
            "budget_bytes": self.budget,
            "planned_bytes": c.need.total,
            "planned_tokens": self.request.tokens,
            "planned_texts": c.how.texts,
            "planned_cache": c.cache,
            "prefill_rows": c.prefill_rows,
            "draft_tokens": c.draft_tokens,
            "without": list(c.how.without),
            "kept_layers": c.kept,
            "streamed_bytes": c.streamed,
            "parts": asdict(c.need),
        }


def make_plan(
    opened: Opened,
    memory: str | int,
    *,
    tokens: int | Callable[[Vocabulary], int | None] | None = None,
    cache: str = "auto",
    draft_tokens: int | None = None,
    drafter: str | Drafter = "auto",
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    texts: int = 1,
    weights: str = "auto",
) -> Plan:
    """The plan for a model whose weights aren't loaded; `memory`, `tokens` and `drafter` as `Engine.load` takes them.
    options: the drafters' options.

    Raises:
        UsageError: the memory is no size.
        ModelError: the files of the weights are damaged.
        BudgetError: nothing fits.
    """
    request = request_of(
        opened,
        tokens(opened.vocabulary) if callable(tokens) else tokens,
        draft_tokens=draft_tokens,
        drafter=drafter,
        options=options,
        strict=strict,
        texts=texts,
        weights=weights,
    )
    budget = budget_of(request, memory)
    smaller = None
    if opened.dtype != "bf16" and alone(request) > budget:
        halved = alone(replace(request, footprint=footprint(opened.checkpoint, opened.config, DTYPES["bf16"])))
        smaller = ("bf16", halved) if halved < alone(request) else None
    return plan(request, budget, cache, smaller)


def alone(request: Request) -> int:
    """Bytes needed with any sequence and any cache: the process, and the weights during loading."""
    found = request.footprint
    if request.device.type != "cpu":
        return found.weights
    if request.streams:
        return request.process + LATER + beside(found) + max(ring(found), found.largest)
    return request.process + LATER + max(found.resident, found.loading)


def budget_of(request: Request, memory: str | int) -> int:
    """The bytes of a size; under `auto`, the machine's available memory. UsageError where it is neither."""
    if memory != "auto":
        return parse_bytes(memory)
    if request.device.type == "cpu":
        return request.process + int(available_bytes() * _AUTO)
    return int(torch.cuda.mem_get_info(request.device)[0] * _AUTO)


def request_of(
    opened: Opened,
    tokens: int | None,
    *,
    draft_tokens: int | None = None,
    drafter: str | Drafter = "auto",
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    texts: int = 1,
    weights: str = "auto",
) -> Request:
    on_cpu = opened.device.type == "cpu"
    found = footprint(opened.checkpoint, opened.config, DTYPES[opened.dtype], CODED.get(opened.dtype))
    return Request(
        config=opened.config,
        dtype=opened.dtype,
        device=opened.device,
        footprint=found,
        tokens=min(tokens or opened.config.context, opened.config.context),
        process=-(-resident_bytes() // _STEADY) * _STEADY,
        draft_tokens=0 if drafter == "none" else draft_tokens or DRAFT_TOKENS,
        streamed_draft_tokens=0 if drafter == "none" else draft_tokens or STREAMED_DRAFT_TOKENS,
        drafters=_specs(drafter, options or {}, found.weights, opened),
        strict=strict,
        threads=torch.get_num_threads() if on_cpu else 1,
        texts=texts,
        weights=weights,
        checkpoint=opened.checkpoint,
        may_drop=drafter == "auto",
    )


def plan(request: Request, budget: int, cache: str = "auto", smaller: tuple[str, int] | None = None) -> Plan:
    """The first choice that fits; with a named cache, among its own choices.

    smaller: a dtype whose weights take less, and the bytes that it needs with any sequence, for the error message.

    Raises:
        BudgetError: there is none. Its message has the least need, by component.
    """
    tried = []
    for candidate in choices(request, cache):
        if candidate.lacks(budget) is None:
            return Plan(request, budget, filled(request, candidate, budget))
        tried.append(candidate)
    least = min(tried, key=lambda candidate: candidate.need.total)
    if (needed := alone(request)) > budget:
        weights = "the weights alone need" if request.device.type != "cpu" else "process and weights alone need"
        less = f", or take --dtype {smaller[0]}, with which it is {shown(smaller[1])}" if smaller else ""
        raise BudgetError(
            f"The memory budget is {shown(budget)}, and {request.tokens:,} tokens need at least "
            f"{shown(least.need.total)}: {weights} {shown(needed)}, which no cache and no shorter text makes less "
            f"({least.need}); give more memory or a smaller model{less}."
        )
    advice = "give more memory, or ask for fewer tokens" + ("" if cache == "auto" else ", or leave the cache to auto")
    if least.need.total <= budget:
        raise BudgetError(f"The cache {least.cache} for {request.tokens:,} tokens {least.lacks(budget)}; {advice}.")
    raise BudgetError(
        f"The memory budget is {shown(budget)}, and {request.tokens:,} tokens need at least {shown(least.need.total)}, "
        f"with the cache {least.cache} and prefill chunks of {least.prefill_rows} rows ({least.need}); {advice}."
    )


def _specs(drafter: str | Drafter, options: Mapping[str, Any], nbytes: int, opened: Opened) -> list[Spec]:
    """The specs of the drafters to plan; a Drafter object already has its memory, before the plan."""
    if isinstance(drafter, Drafter):
        return []
    if drafter != "auto":
        return [parse(drafter, options)]
    return auto(options, nbytes=nbytes, mtp=has_head(opened.checkpoint, opened.config))


def check_weights(weights: str, device: torch.device) -> None:
    """Raise UsageError where they can't be there."""
    if weights not in WEIGHTS:
        raise UsageError(f"The weights can't be {weights!r}; use one of: {', '.join(WEIGHTS)}.")
    if weights == "disk" and device.type != "cpu":
        raise UsageError(f"Weights on disk are for a CPU, and this is {device}; use --device cpu.")


def on_disk(weights: str, plan: Plan | None) -> dict[str, int]:
    """What `Opened.load` takes where layers are to be read from disk for each pass; nothing where they aren't."""
    if plan is None:
        return {"kept": 0, "pool": _POOL} if weights == "disk" else {}
    return {} if plan.choice.kept is None else {"kept": plan.choice.kept, "pool": plan.choice.pool}
