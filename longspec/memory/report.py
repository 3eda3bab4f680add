"""What `longspec plan` says of a request: each kind of cache, the choice that is taken, what it reads for a token, and
what a falling budget leads to.

Takes a request and a budget; gives an object of numbers and names. Loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from longspec.cache import CACHES, LOSSLESS
from longspec.machine.bandwidth import kept_rate
from longspec.machine.disk import read_rate
from longspec.memory.choices import CHUNKS, Choice, Request, choice, choices, filled
from longspec.memory.forecast import forecast
from longspec.memory.plan import alone, budget_of
from longspec.model.weights.footprint import parameters

__all__ = ["report"]


def report(request: Request, memory: str | int, measured: Callable[[float], float] | None = None) -> dict[str, Any]:
    """The object that `longspec plan --json` prints. measured: seconds of a pass by its rows, by earlier runs."""
    budget = budget_of(request, memory)
    picked = next((filled(request, one, budget) for one in choices(request) if one.lacks(budget) is None), None)
    on_disk = picked and _from_disk(request, picked)
    return {
        "dtype": request.dtype,
        "device": str(request.device),
        "context": request.tokens,
        "budget_bytes": budget,
        "process_bytes": request.process,
        "weights_bytes": request.footprint.weights,
        "weights_bits": round(8 * request.footprint.weights / parameters(request.config, tied=request.config.tied), 2),
        "least_bytes": alone(request),
        "picked": picked and _picked(picked),
        "from_disk": on_disk,
        "reads": picked and _reads(request, picked, on_disk, measured),
        "curve": [{"budget_bytes": one.need.total, **_picked(one)} for one in _curve(choices(request))],
        "caches": [_cache(request, name, budget) for name in CACHES],
    }


def _cache(request: Request, name: str, budget: int) -> dict[str, Any]:
    """What a kind of cache takes, with the largest prefill chunk that fits."""
    tried = [choice(request, name, rows) for rows in CHUNKS]
    fitting = next((one for one in tried if one.lacks(budget) is None), None)
    shown = fitting or tried[-1]
    room = CACHES[name](replace(request.shape, device=torch.device("meta"))).room(request.tokens)
    return {
        "cache": name,
        "cache_lossless": name in LOSSLESS,
        "bytes_per_token": room.device / request.tokens,
        "cache_bytes": room.device,
        "host_bytes": room.host,
        "disk_bytes": room.disk,
        "total_bytes": shown.need.total,
        "prefill_rows": shown.prefill_rows,
        "fits": fitting is not None,
        "lacks": shown.lacks(budget),
    }


def _reads(
    request: Request, picked: Choice, on_disk: dict[str, Any] | None, measured: Callable[[float], float] | None
) -> dict[str, Any]:
    """What a token reads, and how many tokens a second that makes."""
    memory = kept_rate() if request.device.type == "cpu" else None
    disk = None if on_disk is None else on_disk["disk_bytes_per_second"]
    known = None if measured is None else 1 / measured(1)
    return {**forecast(request, picked, memory, disk).report(), "measured_tokens_per_second": known}


def _picked(one: Choice) -> dict[str, Any]:
    said = {name: getattr(one, name) for name in ("cache", "prefill_rows", "draft_tokens")}
    return {**said, "weights": "memory" if one.kept is None else "disk"}


def _from_disk(request: Request, picked: Choice) -> dict[str, Any] | None:
    """What a plain token reads of weights on disk, and how long that takes; None where all are in memory."""
    if picked.kept is None:
        return None
    file = None if request.checkpoint is None else request.checkpoint.largest
    rate = None if file is None else read_rate(file)
    return {
        "kept_layers": picked.kept,
        "layers": len(request.footprint.layers),
        "bytes_per_token": picked.streamed,
        "disk_bytes_per_second": rate,
        "tokens_per_second": rate and picked.streamed and rate / picked.streamed,
    }


def _curve(choices: Iterable[Choice]) -> Iterator[Choice]:
    """What is taken as the budget falls: each choice, tried in this order, that needs less than all before it."""
    least = math.inf
    for one in choices:
        if one.need.total < least:
            least = one.need.total
            yield one
