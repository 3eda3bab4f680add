"""The drafter of empty drafts: plain decoding, the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspec.types import Draft, Drafter, Writing

__all__ = ["Nothing"]


class Nothing(Drafter):
    """Proposes empty drafts."""

    serves = False

    @classmethod
    def planned_bytes(cls, target: Any) -> tuple[int, int]:
        return 0, 100 * int(target.tokens)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        return [Draft.chain(()) for _ in sessions]
