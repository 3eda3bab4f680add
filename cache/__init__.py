"""KV caches: one file per kind, over the same blocks of 64 rows. `CACHES` lists them by the name that users write.

A model whose layers aren't all attention has the states of the others beside its rows (`longspec.cache.hybrid`), and
one whose layers have heads of different sizes a cache for each size (`longspec.cache.grouped`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from longspec.cache.codes import Codec, DualCodec
from longspec.cache.dense import Dense
from longspec.cache.disk import FileStore
from longspec.cache.grouped import Grouped
from longspec.cache.hybrid import Hybrid
from longspec.cache.offload import HostStore, Offload
from longspec.cache.quantized import Quantized
from longspec.cache.stage import BLOCK, Bounds, Cache, Segment, Shape, Stage

__all__ = ["BLOCK", "CACHES", "LOSSLESS", "Bounds", "Cache", "Dense", "Segment", "Shape", "Stage"]

_ROWS: dict[str, Callable[[Shape], Cache]] = {
    "dense": Dense,
    "int8": partial(Quantized, codec=Codec(8, symmetric=True)),
    "int4": partial(Quantized, codec=Codec(4)),
    "int2": partial(Quantized, codec=Codec(2)),
    "dual": partial(Quantized, codec=DualCodec()),
    "offload": lambda shape: Offload(shape, HostStore(shape)),
    "disk": lambda shape: Offload(shape, FileStore(shape)),
    "offload --all-rows": lambda shape: Offload(shape, HostStore(shape), all_rows=True),
    "disk --all-rows": lambda shape: Offload(shape, FileStore(shape), all_rows=True),
}


def _cache(kind: str, shape: Shape) -> Cache:
    """A cache of this kind for all of a model's layers; without a layer that keeps rows all kinds are one."""
    if not shape.windows:
        return Hybrid(shape, Dense(shape))
    rows = _ROWS[kind](shape) if len(shape.groups) == 1 else Grouped.of(shape, _ROWS[kind])
    return rows if shape.states is None else Hybrid(shape, rows)


CACHES: dict[str, Callable[[Shape], Cache]] = {kind: partial(_cache, kind) for kind in _ROWS}
"""By the name that users write."""

LOSSLESS = frozenset({"dense", "offload --all-rows", "disk --all-rows"})
"""The kinds that read keys and values as the model computed them. With the others, drafts are verified against the
target over the same lossy cache.
"""
