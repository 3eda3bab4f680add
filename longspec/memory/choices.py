"""What memory may be spent on: kinds of cache, sizes of prefill chunks, how a run drafts, the place of the weights; and
the bytes of each choice.

Takes a model's config and weight footprint, and a sequence length; gives choices, the cheapest in time first. On a CPU
the bytes are the process's peak resident size; on a GPU torch's reserved memory, the host's being separate.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from longspec.cache import CACHES
from longspec.cache.stage import Room, Shape
from longspec.cache.state_stage import StateStage
from longspec.drafters import DRAFT_TOKENS
from longspec.drafters.spec import Spec
from longspec.machine.system import available_bytes, shown
from longspec.memory.gain import DRAFTS, How, hows, taken, whole
from longspec.memory.workspace import workspace
from longspec.model.config import Config
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.layer import shape_of
from longspec.model.load import DTYPES
from longspec.model.weights.footprint import Footprint
from longspec.model.weights.streamed import BUFFERS, spread

__all__ = [
    "CHUNKS",
    "DRAFTS",
    "LATER",
    "STREAMED_DRAFT_TOKENS",
    "WEIGHTS",
    "Choice",
    "Request",
    "beside",
    "choice",
    "choices",
    "filled",
    "ring",
]

CHUNKS = (512, 256, 128, 64)
"""Rows of a prefill chunk, the fastest first: CPU seconds for 6,700 rows in bf16 10.6, 10.9, 12.0 and 15.9."""

WEIGHTS = ("auto", "memory", "disk")
"""Where they may be."""

STREAMED_DRAFT_TOKENS = 48
"""At most, where weights are read from disk for each pass: beside that a row costs little."""

_EXPERTS = 16
"""In memory at least: half of them are used while the other half is read."""

LATER = 20 << 20
"""What any process still gets after the plan: pages of torch's code that a pass touches (16 MiB), the chat template's
engine, the decoder's objects."""

_GPU_LATER = 64 << 20
"""Of the device: what the matrix products reserve for themselves, and what the allocator rounds up."""


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
    weights: str = "auto"  # where they are: in memory, on disk, or there where they don't fit
    streamed_draft_tokens: int = DRAFT_TOKENS  # where weights are read from disk for each pass
    checkpoint: Checkpoint | None = None  # where drafters find heads of the model's own
    may_drop: bool = False  # drafters, as nobody asked for them by name

    @property
    def shape(self) -> Shape:
        return shape_of(self.config, DTYPES[self.dtype], self.device)

    @property
    def streams(self) -> bool:
        """Whether the layers' weights may be on disk."""
        return self.weights != "memory" and self.device.type == "cpu" and bool(self.footprint.layers)


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
    """A kind of cache, a prefill chunk, a way to draft and a place of the weights, with the bytes that they need."""

    cache: str
    prefill_rows: int
    how: How
    need: Need
    host: int = 0  # bytes of host memory, beside a GPU's
    disk: int = 0
    kept: int | None = None  # layers in memory, where the others are read from disk for each pass; None: all
    pool: int = 0  # bytes that their experts may take in memory
    streamed: int = 0  # bytes that a pass of one row is expected to read

    @property
    def draft_tokens(self) -> int:
        """Of a draft at most."""
        return self.how.draft_tokens

    def lacks(self, budget: int | None) -> str | None:
        """The reason why this choice is impossible: the budget, the host's memory, or the disk. None where it fits."""
        if budget is not None and self.need.total > budget:
            return f"needs {shown(self.need.total)} of {shown(budget)}"
        if self.host and self.host > (free := available_bytes()):
            return f"needs {shown(self.host)} of host memory, {shown(free)} of which are free"
        if self.disk and self.disk > (free := shutil.disk_usage(tempfile.gettempdir()).free):
            return f"needs {shown(self.disk)} of disk, {shown(free)} of which are free in {tempfile.gettempdir()}"
        return None


def choices(request: Request, cache: str = "auto") -> Iterator[Choice]:
    """All choices, the cheapest first: ways to draft come before another kind of cache, which may change the text."""
    drafters = taken(request)
    places: list[tuple[int | None, int]] = [(None, request.draft_tokens)] if request.weights != "disk" else []
    places += [(0, request.streamed_draft_tokens)] if request.streams else []
    for kept, most in places:
        ways = hows(request, drafters, most, streams=kept is not None)
        for name in _order(request.device) if cache == "auto" else (cache,):
            for how in ways:
                for rows in CHUNKS:
                    yield choice(request, name, rows, kept, how=how)


def filled(request: Request, found: Choice, budget: int) -> Choice:
    """A choice whose weights are on disk, with as many layers in memory as the budget has left for."""
    if found.kept is None:
        return found
    layers, experts = request.footprint.layers, request.footprint.experts
    left = max(0, budget - found.need.total)
    kept = min(len(layers), left // max(layers))
    made = choice(request, found.cache, found.prefill_rows, kept, how=found.how)
    pool = min(sum(experts), made.pool + max(0, budget - made.need.total)) if experts else 0
    return choice(request, found.cache, found.prefill_rows, kept, pool, how=found.how)


def beside(found: Footprint) -> int:
    """Bytes of the weights that are in memory wherever the layers are."""
    return found.resident - sum(found.layers) - sum(found.experts)


def ring(found: Footprint) -> int:
    """Bytes of the buffers that layers are read into, and of the fewest experts."""
    return min(BUFFERS * max(found.layers), sum(found.layers)) + least_pool(found)


def least_pool(found: Footprint) -> int:
    """Bytes of the experts that are in memory at least."""
    return min(_EXPERTS * max(found.experts, default=0), sum(found.experts))


def choice(
    request: Request, cache: str, prefill_rows: int, kept: int | None = None, pool: int = 0, how: How | None = None
) -> Choice:
    """The choice of that cache, prefill chunk, number of layers in memory and room for experts, with its bytes. how: it
    drafts; as it was asked for, if left out.
    """
    how = whole(request, taken(request)) if how is None else how
    r = replace(request, draft_tokens=how.draft_tokens, texts=how.texts)
    shape, on_cpu = r.shape, r.device.type == "cpu"
    empty = CACHES[cache](replace(shape, device=torch.device("meta")))
    room = Room(*(part * r.texts for part in empty.room(r.tokens)))
    rows = min(max(prefill_rows, r.draft_tokens + 1), r.tokens) + (r.texts - 1) * (r.draft_tokens + 1)
    drafter = how.nbytes
    own = r.process + LATER
    held = drafter + room.host
    working = {
        # A buffer grows by an eighth. On a CPU the unused part was never touched and isn't resident.
        "cache": room.device + room.host if on_cpu else room.device * 9 // 8,
        # On a CPU a dense cache's rows are staged behind its own: a prompt's in its room, a last draft's beyond that.
        "staged": (r.texts * (r.draft_tokens + 1) if on_cpu and empty.in_one_piece else rows) * shape.row_bytes
        + (StateStage.room(shape.states, rows) if shape.states is not None else 0),
        "workspace": workspace(r, empty, rows) + (0 if on_cpu else _GPU_LATER),
    }
    if not on_cpu:
        need = Need(weights=r.footprint.weights, **working)
        return Choice(cache, prefill_rows, how, need, host=held + r.footprint.loading, disk=room.disk)
    found, streamed = r.footprint, 0
    weights, peak = found.resident, found.loading
    if kept is not None:
        pool = max(pool, least_pool(found))
        in_memory = sum(found.layers[i] for i in spread(kept, len(found.layers)))
        streamed = sum(found.layers) - in_memory
        weights = beside(found) + in_memory + min(ring(found) - least_pool(found), streamed) + pool
        peak = max(weights, beside(found) + found.largest)  # the layers are read when all else was
        if (mixture := r.config.mixture) is not None and found.experts:
            streamed += round((sum(found.experts) - pool) * mixture.chosen / mixture.experts)
    need = Need(process=own, weights=weights, drafter=drafter, **working)
    loading = max(0, own + peak - need.total)
    need = Need(own, weights, drafter, **working, loading=loading)
    return Choice(cache, prefill_rows, how, need, disk=room.disk, kept=kept, pool=pool, streamed=streamed)


def _order(device: torch.device) -> tuple[str, ...]:
    """The kinds of cache to try; without offload on a CPU, which has no slower memory to move rows to."""
    return ("dense", "int8", "int4", "disk") if device.type == "cpu" else ("dense", "int8", "int4", "offload", "disk")
