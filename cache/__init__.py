"""KV caches: one file per kind, over the same blocks of 64 rows. `CACHES` lists them by the name that users write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from longspec.cache.codes import Codec, DualCodec
from longspec.cache.dense import Dense
from longspec.cache.disk import FileStore
from longspec.cache.offload import HostStore, Offload
from longspec.cache.quantized import Quantized
from longspec.cache.stage import BLOCK, Bounds, Cache, Segment, Shape, Stage

__all__ = ["BLOCK", "CACHES", "LOSSLESS", "Bounds", "Cache", "Dense", "Segment", "Shape", "Stage"]

CACHES: dict[str, Callable[[Shape], Cache]] = {
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

LOSSLESS = frozenset({"dense", "offload --all-rows", "disk --all-rows"})
"""The kinds that read keys and values as the model computed them. With the others, drafts are verified against the
target over the same lossy cache.
"""
