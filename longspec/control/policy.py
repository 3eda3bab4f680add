"""How much to draft in a step: which drafter, how many tokens at most, and which of these are worth their positions.

Takes what passes cost and drafts kept, and gives limits; knows no model and no clock. A control never sees the text: a
bad one costs time and nothing else. The default is `longspec.control.goodput`; here are the seam and two simple rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from longspec.types import Draft, Needs, Verdict, Writing

__all__ = ["Bet", "Control", "Entropy", "Fixed", "Outcome", "Step"]


class Bet(NamedTuple):
    """What a session's draft may be: at most `limit` tokens of a drafter; where it is 0, `why` there is none."""

    drafter: str
    limit: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one session's bet."""

    session: Writing
    bet: Bet
    draft: Draft  # as it was verified
    kept: Sequence[int]  # its nodes that were kept
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Step:
    """What a step brought and took."""

    outcomes: Sequence[Outcome]
    draft_seconds: Mapping[str, float]  # of each drafter that was asked
    pass_seconds: float | None  # None where a chunk of a prompt shared the pass: it tells nothing of a step's cost
    rows: int  # token positions of the pass, such a chunk's not counted


class Control:
    """Decides each step: `bets`, then the drafters propose, `trim`, the forward pass, `observe`. This one: always all.

    drafter: who drafts.
    """

    needs = Needs()

    def __init__(self, drafter: str) -> None:
        self.drafter = drafter

    def bets(self, sessions: Sequence[Writing], most: Sequence[int]) -> list[Bet]:
        """One for each session, of at most `most[i]` tokens."""
        return [Bet(self.drafter, limit) for limit in most]

    def trim(self, sessions: Sequence[Writing], bets: Sequence[Bet], drafts: Sequence[Draft]) -> list[Draft]:
        """The drafts without nodes that aren't worth their positions. One that is `whole` stays so."""
        return list(drafts)

    def observe(self, step: Step) -> None:
        """Learn from a step."""

    def report(self) -> dict[str, Any]:
        """What a later run may begin with, as JSON."""
        return {}


Fixed = Control


class Entropy(Control):
    """No draft where the target's last distribution had more than `most` nats (Cerberus's gate, 2410.13344)."""

    needs = Needs(entropy=True)

    def __init__(self, drafter: str, most: float = 2.0) -> None:
        super().__init__(drafter)
        self.most = most
        self._last: WeakKeyDictionary[Writing, float] = WeakKeyDictionary()

    def bets(self, sessions: Sequence[Writing], most: Sequence[int]) -> list[Bet]:
        hard = [self._last.get(session, 0.0) > self.most for session in sessions]
        return [
            Bet("", 0, "unsure") if is_hard else Bet(self.drafter, limit)
            for is_hard, limit in zip(hard, most, strict=True)
        ]

    def observe(self, step: Step) -> None:
        for outcome in step.outcomes:
            if outcome.verdict.entropy is not None:
                self._last[outcome.session] = outcome.verdict.entropy
