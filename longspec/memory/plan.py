"""The memory plan: the bytes that a sequence will need, computed before any weight is loaded, and the cheapest choice
that fits.

Takes a model's config and weight footprint, and a sequence length; gives each choice's bytes by component, and the
first choice that fits, in this order:

    dense, int8, int4, then offload (on a GPU) and disk; each with prefill chunks of 512, 256, 128, 64 tokens

A smaller chunk costs time before the first token only (measured: with chunks of 64, prefill takes half as long
again); another kind of cache costs time with every token, and its output may differ from dense's: so all chunks come
before the next kind. It loads nothing and monitors nothing (`longspec.engine.memory_guard`).

On a CPU the bytes are the process's peak resident size; on a GPU torch's reserved memory, the host's being separate.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from longspec.cache import CACHES, LOSSLESS
from longspec.cache.stage import Room, Shape
from longspec.cache.state_stage import StateStage
from longspec.drafters import DRAFT_TOKENS
from longspec.drafters.auto import auto
from longspec.drafters.spec import Spec, parse
from longspec.errors import BudgetError
from longspec.heads.published.mtp import has_head
from longspec.machine.system import available_bytes, parse_bytes, resident_bytes, shown
from longspec.memory.workspace import workspace
from longspec.model.config import Config
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.layer import shape_of
from longspec.model.load import CODED, DTYPES, Opened
from longspec.model.weights.footprint import Footprint, footprint
from longspec.types import Drafter

__all__ = [
    "CHUNKS",
    "Choice",
    "Plan",
    "Request",
    "alone",
    "budget_of",
    "choice",
    "choices",
    "make_plan",
    "plan",
    "request_of",
]

CHUNKS = (512, 256, 128, 64)
"""Rows of a prefill chunk, the fastest first: CPU seconds for 6,700 rows in bf16 10.6, 10.9, 12.0 and 15.9."""

DRAFTS = (8, 4, 2)
"""Drafted tokens to try where those asked for don't fit: the logits of a tree are its memory (SpecMemo, 2506.01986)."""

_LATER = 24 << 20
"""What any process still gets after the plan: pages of torch's code that a pass touches (15 MiB), the chat template's
engine, the decoder's objects."""

_STEADY = 4 << 20
"""What the process has is rounded up to this, so that the same command is planned alike every time."""

_GPU_LATER = 64 << 20
"""Of the device: what the matrix products reserve for themselves, and what the allocator rounds up."""


_AUTO = 0.9
"""Of what the machine has left, under `--memory auto`: others grow too."""


@dataclass(frozen=True, slots=True)
class Request:
    """A model that isn't loaded, and the sequences to plan for."""

    config: Config
    dtype: str  # a key of DTYPES
    device: torch.device
    footprint: Footprint
    tokens: int  # prompt and answer, of each sequence
    process: int  # bytes of the process now
    draft_tokens: int = DRAFT_TOKENS
    drafters: Sequence[Spec] = ()  # any of which a sequence may use
    strict: bool = False
    threads: int = 1
    texts: int = 1  # sequences decoded side by side
    checkpoint: Checkpoint | None = None  # where drafters find heads of the model's own

    @property
    def shape(self) -> Shape:
        return shape_of(self.config, DTYPES[self.dtype], self.device)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes at the peak, by component."""

    process: int = 0  # interpreter, libraries, tokenizer; none on a GPU
    weights: int = 0
    drafter: int = 0
    cache: int = 0
    staged: int = 0  # keys and values of staged rows
    workspace: int = 0  # a pass's temporary tensors
    loading: int = 0  # temporary bytes of loading the weights, beyond all the others

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    def __str__(self) -> str:
        return ", ".join(
            f"{part.name} {shown(nbytes)}" for part in fields(self) if (nbytes := getattr(self, part.name))
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A kind of cache, a prefill chunk and a size of drafts, with the bytes that they need."""

    cache: str
    prefill_rows: int
    draft_tokens: int
    need: Need
    host: int = 0  # bytes of host memory, beside a GPU's
    disk: int = 0

    def lacks(self, budget: int | None) -> str | None:
        """The reason why this choice is impossible: the budget, the host's memory, or the disk. None where it fits."""
        if budget is not None and self.need.total > budget:
            return f"needs {shown(self.need.total)} of {shown(budget)}"
        if self.host and self.host > (free := available_bytes()):
            return f"needs {shown(self.host)} of host memory, {shown(free)} of which are free"
        if self.disk and self.disk > (free := shutil.disk_usage(tempfile.gettempdir()).free):
            return f"needs {shown(self.disk)} of disk, {shown(free)} of which are free in {tempfile.gettempdir()}"
        return None


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice for a sequence under a budget."""

    request: Request
    budget: int
    choice: Choice

    def __str__(self) -> str:
        c = self.choice
        said = (
            f"{shown(c.need.total)} of {shown(self.budget)} planned for {self.request.tokens:,} tokens"
            f"{f' in each of {self.request.texts} texts' if self.request.texts > 1 else ''}: cache {c.cache}"
        )
        said += "" if c.cache in LOSSLESS else " (the text may differ from dense's)"
        said += "" if c.prefill_rows == CHUNKS[0] else f", prefill in chunks of {c.prefill_rows} rows"
        few = c.draft_tokens < self.request.draft_tokens
        return f"{said}, at most {c.draft_tokens} drafted tokens" if few else said

    @property
    def spare(self) -> int:
        """Bytes of the budget that nothing is planned for."""
        return max(0, self.budget - self.choice.need.total)

    def report(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        c = self.choice
        return {
            "budget_bytes": self.budget,
            "planned_bytes": c.need.total,
            "planned_tokens": self.request.tokens,
            "planned_texts": self.request.texts,
            "planned_cache": c.cache,
            "prefill_rows": c.prefill_rows,
            "draft_tokens": c.draft_tokens,
            "parts": asdict(c.need),
        }


def make_plan(
    opened: Opened,
    memory: str | int,
    *,
    tokens: int | None = None,
    cache: str = "auto",
    draft_tokens: int = DRAFT_TOKENS,
    drafter: str | Drafter = "auto",
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    texts: int = 1,
) -> Plan:
    """The plan for a model whose weights aren't loaded; `memory`, `tokens` and `drafter` as `Engine.load` takes them.
    options: the drafters' options.

    Raises:
        UsageError: the memory is no size.
        ModelError: the files of the weights are damaged.
        BudgetError: nothing fits.
    """
    request = request_of(
        opened, tokens, draft_tokens=draft_tokens, drafter=drafter, options=options, strict=strict, texts=texts
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
    return request.process + _LATER + max(found.resident, found.loading)


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
    draft_tokens: int = DRAFT_TOKENS,
    drafter: str | Drafter = "auto",
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    texts: int = 1,
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
        draft_tokens=0 if drafter == "none" else draft_tokens,
        drafters=_specs(drafter, options or {}, found.weights, opened),
        strict=strict,
        threads=torch.get_num_threads() if on_cpu else 1,
        texts=texts,
        checkpoint=opened.checkpoint,
    )


def plan(request: Request, budget: int, cache: str = "auto", smaller: tuple[str, int] | None = None) -> Plan:
    """The first choice that fits; with a named cache, among its own choices.

    smaller: a dtype whose weights take less, and the bytes that it needs with any sequence, for the error message.

    Raises:
        BudgetError: there is none. Its message has the least need, by component.
    """
    tried = list(choices(request, cache))
    for candidate in tried:
        if candidate.lacks(budget) is None:
            return Plan(request, budget, candidate)
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


def choices(request: Request, cache: str = "auto") -> Iterator[Choice]:
    """All choices, the cheapest first."""
    for name in _order(request.device) if cache == "auto" else (cache,):
        for drafts in (request.draft_tokens, *(few for few in DRAFTS if few < request.draft_tokens)):
            for rows in CHUNKS:
                yield choice(replace(request, draft_tokens=drafts), name, rows)


def choice(request: Request, cache: str, prefill_rows: int) -> Choice:
    """The choice of that cache and prefill chunk, with its bytes."""
    r, shape, on_cpu = request, request.shape, request.device.type == "cpu"
    empty = CACHES[cache](replace(shape, device=torch.device("meta")))
    room = Room(*(part * r.texts for part in empty.room(r.tokens)))
    rows = min(max(prefill_rows, r.draft_tokens + 1), r.tokens) + (r.texts - 1) * (r.draft_tokens + 1)
    drafter = sum(spec.planned_bytes(r) for spec in r.drafters)
    own = r.process + _LATER
    held = drafter + room.host
    working = {
        # A buffer grows by an eighth. On a CPU the unused part was never touched and isn't resident.
        "cache": room.device + room.host if on_cpu else room.device * 9 // 8,
        "staged": rows * shape.row_bytes + (StateStage.room(shape.states, rows) if shape.states is not None else 0),
        "workspace": workspace(r, empty, rows) + (0 if on_cpu else _GPU_LATER),
    }
    if not on_cpu:
        need = Need(weights=r.footprint.weights, **working)
        return Choice(cache, prefill_rows, r.draft_tokens, need, host=held + r.footprint.loading, disk=room.disk)
    need = Need(process=own, weights=r.footprint.resident, drafter=drafter, **working)
    loading = max(0, own + r.footprint.loading - need.total)
    need = Need(own, need.weights, drafter, **working, loading=loading)
    return Choice(cache, prefill_rows, r.draft_tokens, need, disk=room.disk)


def _specs(drafter: str | Drafter, options: Mapping[str, Any], nbytes: int, opened: Opened) -> list[Spec]:
    """The specs of the drafters to plan; a Drafter object already has its memory, before the plan."""
    if isinstance(drafter, Drafter):
        return []
    if drafter != "auto":
        return [parse(drafter, options)]
    return auto(options, nbytes=nbytes, mtp=has_head(opened.checkpoint, opened.config))


def _order(device: torch.device) -> tuple[str, ...]:
    """The kinds of cache to try; without offload on a CPU, which has no slower memory to move rows to."""
    return ("dense", "int8", "int4", "disk") if device.type == "cpu" else ("dense", "int8", "int4", "offload", "disk")
