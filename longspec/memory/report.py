"""What `longspec plan` says of a request: each kind of cache, the choice that is taken, what it reads for a token, and
what a falling budget leads to.

Takes a request and a budget; gives an object of numbers and names. Loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from longspec.cache import CACHES, LOSSLESS
from longspec.machine.bandwidth import kept_rate
from longspec.machine.disk import read_rate
from longspec.memory.choices import CHUNKS, Choice, Request, choice, choices, filled
from longspec.memory.forecast import forecast
from longspec.memory.gain import How, taken, whole
from longspec.memory.plan import alone, budget_of
from longspec.model.weights.footprint import parameters

__all__ = ["report"]


def report(request: Request, memory: str | int, measured: Callable[[float], float] | None = None) -> dict[str, Any]:
    """The object that `longspec plan --json` prints. Its `parts` are bytes of what is picked, or of the least that
    there is where nothing fits. measured: seconds of a pass by its rows, by earlier runs.
    """
    budget = budget_of(request, memory)
    tried, how = list(choices(request)), whole(request, taken(request))
    picked = next((filled(request, one, budget) for one in tried if one.lacks(budget) is None), None)
    least = min(tried, key=lambda one: one.need.total)
    rates = _rates(request)
    curve = [{"budget_bytes": one.need.total, **_picked(request, one, rates)} for one in _curve(tried)]
    return {
        "dtype": request.dtype,
        "device": str(request.device),
        "context": request.tokens,
        "budget_bytes": budget,
        "process_bytes": request.process,
        "weights_bytes": request.footprint.weights,
        "weights_bits": round(8 * request.footprint.weights / parameters(request.config, tied=request.config.tied), 2),
        "least_bytes": alone(request),
        "parts": asdict((picked or least).need),
        "picked": picked and _picked(request, picked, rates),
        "from_disk": picked and _from_disk(request, picked, rates),
        "reads": picked and _reads(request, picked, rates, measured),
        "candidates": len(tried),
        "next": next((one for one in reversed(curve) if one["budget_bytes"] > budget), None),
        "curve": curve,
        "caches": [_cache(request, name, budget, how) for name in CACHES],
    }


class _Rates(NamedTuple):
    """Bytes per second of reading; None where it isn't known."""

    memory: float | None
    disk: float | None


def _rates(request: Request) -> _Rates:
    file = request.checkpoint.largest if request.checkpoint is not None and request.streams else None
    memory = kept_rate() if request.device.type == "cpu" else None
    return _Rates(memory, None if file is None else read_rate(file))


def _cache(request: Request, name: str, budget: int, how: How) -> dict[str, Any]:
    """What a kind of cache takes, with the largest prefill chunk that fits."""
    tried = [choice(request, name, rows, how=how) for rows in CHUNKS]
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
    request: Request, picked: Choice, rates: _Rates, measured: Callable[[float], float] | None
) -> dict[str, Any]:
    """What a token reads, and how many tokens a second that makes."""
    known = None if measured is None else 1 / measured(1)
    return {**forecast(request, picked, *rates).report(), "measured_tokens_per_second": known}


def _picked(request: Request, one: Choice, rates: _Rates) -> dict[str, Any]:
    """A choice. tokens_per_second: what reading allows, times what its drafts are expected to bring."""
    seconds = forecast(request, one, *rates).seconds(1)
    return {
        "cache": one.cache,
        "prefill_rows": one.prefill_rows,
        "draft_tokens": one.draft_tokens,
        "drafters": [each.spec.name for each in one.how.drafters],
        "weights": "memory" if one.kept is None else "disk",
        "gain": round(one.how.gain, 3),
        "tokens_per_second": seconds and round(one.how.gain / seconds, 3),
    }


def _from_disk(request: Request, picked: Choice, rates: _Rates) -> dict[str, Any] | None:
    """What a plain token reads of weights on disk, and how long that takes; None where all are in memory."""
    if picked.kept is None:
        return None
    return {
        "kept_layers": picked.kept,
        "layers": len(request.footprint.layers),
        "bytes_per_token": picked.streamed,
        "disk_bytes_per_second": rates.disk,
        "tokens_per_second": rates.disk and picked.streamed and rates.disk / picked.streamed,
    }


def _curve(choices: Iterable[Choice]) -> Iterator[Choice]:
    """What is taken as the budget falls: each choice, tried in this order, that needs less than all before it."""
    least = math.inf
    for one in choices:
        if one.need.total < least:
            least = one.need.total
            yield one
