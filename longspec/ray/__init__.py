"""Batches beyond one machine: engines as the actors of a Ray cluster, for `longspec batch --on ray` and for your own
Ray Data pipelines (`Writer`).

    input -> groups of records -> map_batches(Actor) -> lines -> output
    (one reader)                  (one engine each)     (one writer: the driver)

Ray is imported where it is used: it is the extra `ray`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspec.ray.writer import Writer as Writer

__all__ = ["Writer"]


def __getattr__(name: str) -> Any:
    if name == "Writer":
        from longspec.ray.writer import Writer

        return Writer
    raise AttributeError(f"module 'longspec.ray' has no attribute {name!r}")
