"""The drafter that never bets: plain decoding, the baseline of every other."""

from __future__ import annotations

from collections.abc import Sequence

from longspec.types import Commit, Draft, Verdict, Writing

__all__ = ["Nothing"]


class Nothing:
    """Proposes empty drafts."""

    def begin(self, session: Writing) -> None:
        pass

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        return [Draft.chain(()) for _ in sessions]

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        pass
