"""What a run is expected to read for a token, and how long that takes: before anything is loaded.

Takes a plan's request and choice, and the rates at which memory and disk are read; gives bytes and seconds of passes.
A pass takes as long as its reading, by products that reach three quarters of the memory's rate, and a little for each
layer: what the threads need to meet (docs/design.md: 1.6 ms beside reading for the 30 layers of the default model).
What earlier runs have measured of this model's passes is better, and isn't known here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from longspec.cache import CACHES
from longspec.memory.choices import Choice, Request
from longspec.model.reads import Reads, rows_read

__all__ = ["REACHED", "Forecast", "forecast"]

REACHED = 0.75
"""Of the memory's rate, by products: beside `_LAYER` .65 to .75 by the process's own time, of codes and bf16 of 135M to
1.5B (docs/benchmarks/forecast.json).
"""

_LAYER = 50e-6  # seconds beside reading
ROWS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What passes of one text read."""

    reads: Reads
    cache: int  # bytes of the cache for the last token
    layers: int
    streamed: int  # bytes from disk for a plain pass
    memory_rate: float | None  # bytes per second
    disk_rate: float | None

    @property
    def bytes_per_token(self) -> int:
        """Of a plain token, the last of the text."""
        return round(self.reads.by_rows(1)) + self.cache

    def seconds(self, rows: int) -> float | None:
        """Of a pass of so many rows; None where no rate is known."""
        if self.memory_rate is None or (self.streamed and self.disk_rate is None):
            return None
        growth = self.reads.by_rows(rows) / self.reads.by_rows(1)
        memory = (self.reads.by_rows(rows) + self.cache) / (REACHED * self.memory_rate) + self.layers * _LAYER
        return memory if self.disk_rate is None else max(memory, self.streamed * growth / self.disk_rate)

    def report(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        seconds, mixture = self.seconds(1), self.reads.mixture
        unions = [(rows, 0.0 if mixture is None else mixture.union(rows)) for rows in ROWS]
        return {
            "bytes_per_token": self.bytes_per_token,
            "weights_bytes": round(self.reads.by_rows(1)),
            "cache_bytes": self.cache,
            "memory_bytes_per_second": self.memory_rate and round(self.memory_rate),
            "tokens_per_second": seconds and 1 / seconds,
            "experts": None if mixture is None else mixture.experts,
            "union": [
                {"rows": rows, "experts": round(union, 1), "bytes": round(self.reads.by_union(union))}
                for rows, union in unions
            ]
            if mixture is not None
            else None,
        }


def forecast(request: Request, choice: Choice, memory_rate: float | None, disk_rate: float | None = None) -> Forecast:
    """A run's, by its choice."""
    shape, config = request.shape, request.config
    empty = CACHES[choice.cache](replace(shape, device=torch.device("meta")))
    dense = CACHES["dense"](replace(shape, device=torch.device("meta")))
    held = empty.room(request.tokens).device / max(1, dense.room(request.tokens).device)  # of what dense rows take
    cache = round(rows_read(shape, request.tokens) * min(1.0, held))
    return Forecast(request.footprint.reads, cache, config.layers, choice.streamed, memory_rate, disk_rate)
