"""Sparse-attention self-speculation (SparseSpec, 2512.01278; TriForce, 2404.11912; QuantSpec, 2502.10424).

All layers of the target run, over a cheap view of its KV cache: attention sinks and recent positions, the pages that
the queries select, or the upper plane of a dual cache. It pays off where reading the KV cache dominates a forward pass:
on long sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from longspec.cache.views import Pages, Upper, View, Window, viewed
from longspec.drafters.common.tree_growth import grow
from longspec.errors import UsageError
from longspec.model.decoder import Decoder, Rows
from longspec.types import Draft, Drafter, Writing

__all__ = ["VIEWS", "Sparse"]

VIEWS: dict[str, Callable[[], View]] = {"window": Window, "pages": Pages, "upper": Upper}


class Sparse(Drafter):
    """Drafts by forward passes over a view of the cache. view: one of VIEWS. `inner` may draft for them in turn."""

    takes_inner = True

    def __init__(self, decoder: Decoder, view: str = "pages", inner: Drafter | None = None) -> None:
        self.decoder = decoder
        self.view = VIEWS[view]
        self.inner = inner
        self._views: WeakKeyDictionary[Writing, View] = WeakKeyDictionary()

    @classmethod
    def make(cls, model: Any, inner: Drafter | None = None, *, view: str = "pages") -> Drafter:
        if view not in VIEWS:
            raise UsageError(f"sparse has no view {view!r}; use one of: {', '.join(VIEWS)}.")
        return cls(model.decoder, view, inner)

    def begin(self, session: Writing) -> None:
        self._views[session] = self.view()
        super().begin(session)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        return grow(self, sessions, limits, ahead, inner=self.inner)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        return viewed(session.cache, self._views[session]), session.cache.length, session.unfed

    def forward(self, rows: Rows) -> Tensor:
        return self.decoder.forward(rows)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass
