"""The memory budget: what a text will take, told before any weight is loaded, and the cheapest change that fits.

Takes a model's config and footprint and a text's length; gives what each choice needs, by parts, and the first that
fits, in this order:

    dense, int8, int4, then offload (on a GPU) and disk; each with prefill chunks of 512, 256, 128, 64 rows

A smaller chunk costs time before the first token only (measured: 64 rows half as much again); another kind costs time
with every token, and its text may differ from dense's: so all chunks come before the next kind. It loads nothing and
watches nothing (`watch`).

On a CPU the bytes are the peak resident size of the process; on a GPU what torch reserves there, the host's apart.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from longspec.cache import CACHES, LOSSLESS
from longspec.cache.stage import BLOCK, PIECE_BLOCKS, Cache, Room, Shape
from longspec.drafters import DRAFT_TOKENS
from longspec.drafters.auto import auto
from longspec.drafters.spec import Spec, parse
from longspec.errors import BudgetError
from longspec.machine.system import available_bytes, parse_bytes, resident_bytes, shown
from longspec.model.config import Config
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.store import place_of_codes
from longspec.model.load import DTYPES, Opened
from longspec.model.weights.footprint import Footprint, footprint
from longspec.types import Drafter

__all__ = [
    "CHUNKS",
    "Choice",
    "Need",
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

_LATER = 24 << 20
"""What any process still gets after the plan: pages of torch's code that a pass touches (15 MiB), the chat template's
engine, the decoder's objects."""

_STEADY = 4 << 20
"""What the process has is rounded up to this, so that the same command is planned alike every time."""

_GPU_LATER = 64 << 20
"""Of the device: what the matrix products reserve for themselves, and what the allocator rounds up."""

_PER_THREAD = 2 << 20
"""Buffers of the attention kernel."""

_AUTO = 0.9
"""Of what the machine has left, under `--memory auto`: others grow too."""


@dataclass(frozen=True, slots=True)
class Request:
    """A model that isn't loaded, and a text that it is to write."""

    config: Config
    dtype: str  # a key of DTYPES
    device: torch.device
    footprint: Footprint
    tokens: int  # prompt and answer, of each text
    process: int  # bytes that the process has now
    draft_tokens: int = DRAFT_TOKENS
    drafters: Sequence[Spec] = ()  # of which each text may use any
    strict: bool = False
    threads: int = 1
    texts: int = 1  # that are written side by side

    @property
    def shape(self) -> Shape:
        c = self.config
        return Shape(c.key_heads, c.head_dim, c.windows, DTYPES[self.dtype], self.device)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes at the peak, by what they are for."""

    process: int = 0  # interpreter, libraries, tokenizer; none on a GPU
    weights: int = 0
    drafter: int = 0
    cache: int = 0
    staged: int = 0  # rows of a pass that are not text yet
    workspace: int = 0  # what a pass computes with
    loading: int = 0  # what loading the weights takes beyond all that

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    def __str__(self) -> str:
        return ", ".join(
            f"{part.name} {shown(nbytes)}" for part in fields(self) if (nbytes := getattr(self, part.name))
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to write the text."""

    cache: str
    prefill_rows: int
    need: Need
    host: int = 0  # bytes of host memory beside a GPU
    disk: int = 0

    def lacks(self, budget: int | None) -> str | None:
        """Why it can't be had: the budget, the host's memory, or the disk. None where it can."""
        if budget is not None and self.need.total > budget:
            return f"needs {shown(self.need.total)} of {shown(budget)}"
        if self.host and self.host > (free := available_bytes()):
            return f"needs {shown(self.host)} of host memory, {shown(free)} of which are free"
        if self.disk and self.disk > (free := shutil.disk_usage(tempfile.gettempdir()).free):
            return f"needs {shown(self.disk)} of disk, {shown(free)} of which are free in {tempfile.gettempdir()}"
        return None


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice for a text under a budget."""

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
        return said + ("" if c.prefill_rows == CHUNKS[0] else f", prefill in chunks of {c.prefill_rows} rows")

    def report(self) -> dict[str, Any]:
        """As `--json` prints it."""
        c = self.choice
        return {
            "budget_bytes": self.budget,
            "planned_bytes": c.need.total,
            "planned_tokens": self.request.tokens,
            "planned_texts": self.request.texts,
            "planned_cache": c.cache,
            "prefill_rows": c.prefill_rows,
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
    """The plan for a model that is opened and not loaded; `memory`, `tokens` and `drafter` as `Engine.load` takes them.
    options: those of drafters.

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
    """What is needed whatever the text and the cache: the process, and the weights as they are loaded."""
    found = request.footprint
    if request.device.type != "cpu":
        return found.weights
    return request.process + _LATER + max(found.resident, found.loading)


def budget_of(request: Request, memory: str | int) -> int:
    """Bytes of a size, or under `auto` of what this machine has left. UsageError where it is neither."""
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
    found = footprint(opened.checkpoint, opened.config, DTYPES[opened.dtype])
    return Request(
        config=opened.config,
        dtype=opened.dtype,
        device=opened.device,
        footprint=with_codes(found, opened.checkpoint, opened.config) if opened.dtype == "int8" else found,
        tokens=min(tokens or opened.config.context, opened.config.context),
        process=-(-resident_bytes() // _STEADY) * _STEADY,
        draft_tokens=0 if drafter == "none" else draft_tokens,
        drafters=_specs(drafter, options or {}, found.weights),
        strict=strict,
        threads=torch.get_num_threads() if on_cpu else 1,
        texts=texts,
    )


def with_codes(bf16: Footprint, checkpoint: Checkpoint, config: Config) -> Footprint:
    """Codes take 9 bits at most. Those of a GGUF file leave the embedding's pages of the bf16 weights; others are made
    of bf16 weights, whose pages stay.
    """
    codes = bf16.weights * 9 // 16
    if not checkpoint.coded:
        return Footprint(codes, bf16.resident + codes, bf16.loading + 2 * codes)
    resident = codes + 2 * config.vocabulary * config.width
    kept = checkpoint.folder is not None and place_of_codes(checkpoint.folder).is_dir()
    return Footprint(codes, resident, resident if kept else max(bf16.loading, resident + 2 * codes))


def plan(request: Request, budget: int, cache: str = "auto", smaller: tuple[str, int] | None = None) -> Plan:
    """The first choice that fits; with a cache by name, the first of its own.

    smaller: a dtype whose weights take less, and what they need alone.

    Raises:
        BudgetError: there is none. It says what the least would be, by parts.
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
    """What may be chosen, the cheapest first."""
    for name in _order(request.device) if cache == "auto" else (cache,):
        for rows in CHUNKS:
            yield choice(request, name, rows)


def choice(request: Request, cache: str, prefill_rows: int) -> Choice:
    """What the text needs with that cache and prefill chunk."""
    r, shape, on_cpu = request, request.shape, request.device.type == "cpu"
    empty = CACHES[cache](replace(shape, device=torch.device("meta")))
    room = Room(*(part * r.texts for part in empty.room(r.tokens)))
    rows = min(max(prefill_rows, r.draft_tokens + 1), r.tokens) + (r.texts - 1) * (r.draft_tokens + 1)
    drafter = sum(spec.planned_bytes(r) for spec in r.drafters)
    own = r.process + _LATER
    held = drafter + room.host
    working = {
        # A buffer grows by an eighth. On a CPU what stands empty of it was never touched, and takes nothing.
        "cache": room.device + room.host if on_cpu else room.device * 9 // 8,
        "staged": rows * shape.row_bytes,
        "workspace": _workspace(r, empty, rows) + (0 if on_cpu else _GPU_LATER),
    }
    if not on_cpu:
        need = Need(weights=r.footprint.weights, **working)
        return Choice(cache, prefill_rows, need, host=held + r.footprint.loading, disk=room.disk)
    need = Need(process=own, weights=r.footprint.resident, drafter=drafter, **working)
    loading = max(0, own + r.footprint.loading - need.total)
    return Choice(cache, prefill_rows, Need(own, need.weights, drafter, **working, loading=loading), disk=room.disk)


def _specs(drafter: str | Drafter, options: Mapping[str, Any], nbytes: int) -> list[Spec]:
    """What will draft; a drafter that is made already takes its memory before the plan."""
    if isinstance(drafter, Drafter):
        return []
    return auto(options, nbytes=nbytes) if drafter == "auto" else [parse(drafter, options)]


def _order(device: torch.device) -> tuple[str, ...]:
    """On a CPU, offload has nothing below it to move rows to."""
    return ("dense", "int8", "int4", "disk") if device.type == "cpu" else ("dense", "int8", "int4", "offload", "disk")


def _workspace(r: Request, cache: Cache, rows: int) -> int:
    """Activations, masks, scores and logits of the largest pass, from above: measured, 0.4 to 0.9 of it is used."""
    c, item = r.config, DTYPES[r.dtype].itemsize
    heads = (c.heads + 2 * c.key_heads) * c.head_dim
    activations = rows * (4 * c.mlp_width + 8 * c.width + 3 * heads) * item
    partial = rows * c.heads * c.head_dim * 4 * 6  # outputs in fp32 while parts are merged
    layer = 2 * c.key_heads * c.head_dim * item  # of one row
    piece = r.tokens if cache.in_one_piece else min(r.tokens, PIECE_BLOCKS * BLOCK)
    read = 2 * piece * layer  # decoded, and laid out anew for the kernel
    windows = [window for window in c.windows if window is not None]
    masked = r.tokens if not cache.in_one_piece else min(r.tokens, max(windows, default=0) + rows)
    masks = 3 * rows * (c.heads // c.key_heads) * masked * item
    # Without a kernel that gives the log-sum-exp: scores, their exponents and two copies, in fp32.
    scores = 16 * c.heads * rows * piece if c.attention_softcap or r.device.type != "cpu" else 0
    strict = 3 * r.tokens * layer if r.strict else 0
    logits = r.texts * (r.draft_tokens + 1) * c.vocabulary * (item + 32)  # sorted, and with their noise
    return activations + partial + read + masks + scores + strict + logits + r.threads * _PER_THREAD
