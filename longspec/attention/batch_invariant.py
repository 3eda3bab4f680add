"""Batch-invariant attention (`--strict`): a position's bits depend only on the columns it attends to.

Each position is computed on its own: its allowed columns of all segments, in order of position, as one run. The run's
shape and values are the same in plain decoding, in a prefill chunk and on a path of a tree, so the kernel sums in the
same order. The cost is one call per position and layer, and a copy of the columns where they aren't contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from longspec.attention import reference
from longspec.cache.stage import Segment

__all__ = ["attend_strictly"]


def attend_strictly(
    queries: Tensor, parts: Iterable[Segment], scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """As `longspec.attention.attend`: queries [q, H, D] over all segments; [q, H, D] in their dtype."""
    pieces = list(reference.decoded(parts))
    allowed = [part.bounds.allowed(part.keys.shape[1]) if part.bounds is not None else None for part in pieces]
    output = torch.empty_like(queries)
    for i in range(len(queries)):
        runs = [
            _columns(part, i, None if rows is None else rows[i]) for part, rows in zip(pieces, allowed, strict=True)
        ]
        keys, values = (torch.cat(tensors, 1).contiguous() for tensors in zip(*runs, strict=True))
        row, run = queries[i : i + 1].contiguous(), Segment.dense(keys, values)
        if softcap is None and sinks is None:
            output[i : i + 1] = reference.whole(row, run, scale)
            continue
        made, lse = reference.read(row, run, scale, softcap)
        output[i : i + 1] = (made if sinks is None else reference.sunk(made, lse, sinks)).to(queries.dtype)
    return output


def _columns(part: Segment, row: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    keys, values = part.keys, part.values
    if part.chosen is not None:
        keys, values = part.chosen.put(row, keys, values)
    return (keys, values) if allowed is None else (keys[:, allowed], values[:, allowed])
