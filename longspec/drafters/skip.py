"""The target with sub-layers left out, betting on itself (Draft & Verify, 2309.08168; SWIFT, 2410.06916).

It reads the target's own cache, so that nothing is kept twice; its own rows are inexact, and their stage is dropped.
Which sub-layers are left out is a `Skip`: given, or the middle ones at first (`usual`) and then searched by `Search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from longspec.drafters.grow import grow
from longspec.model.decoder import Decoder, Rows, Skip
from longspec.types import Commit, Draft, Drafter, Verdict, Writing

__all__ = ["Skipping", "usual"]


class Skipping:
    """Drafts by passes that skip. `inner` bets for it in turn."""

    def __init__(self, decoder: Decoder, skip: Skip | None = None, inner: Drafter | None = None) -> None:
        self.decoder = decoder
        self.skip = usual(decoder.config.layers) if skip is None else skip
        self.inner = inner

    def begin(self, session: Writing) -> None:
        if self.inner is not None:
            self.inner.begin(session)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        return grow(self, sessions, limits, ahead, inner=self.inner)

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        if self.inner is not None:
            self.inner.observe(session, commit, verdict)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        return session.cache.open(), session.cache.length, session.unfed

    def forward(self, rows: Rows) -> Tensor:
        return self.decoder.forward(rows, skip=self.skip)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass


def usual(layers: int) -> Skip:
    """Every fourth layer of the middle half: what is lost least before anything was measured."""
    ends = max(1, layers // 4)
    left_out = frozenset(range(ends, layers - ends, 4))
    return Skip(left_out, left_out)
