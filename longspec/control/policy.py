"""The seam of control: which drafter, how many tokens at most, and which of these are worth their positions.

Takes latencies and acceptance, and gives limits; knows no model and no clock. A control never sees the text: a bad
one costs time and nothing else. The default is `longspec.control.goodput`; here are the base class and a simple rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from longspec.types import Draft, Needs, Verdict, Writing

__all__ = ["Bet", "Control", "Entropy", "Fixed", "Limits", "Outcome", "Step"]


class Bet(NamedTuple):
    """A session's permission to draft: a drafter and at most `limit` tokens; where it is 0, `why` is the reason."""

    drafter: str
    limit: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one session's bet."""

    session: Writing
    bet: Bet
    draft: Draft  # as verified
    kept: Sequence[int]  # indices of the kept nodes
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Step:
    """One step's results and latencies."""

    outcomes: Sequence[Outcome]
    draft_seconds: Mapping[str, float]  # by drafter, of those that were asked
    pass_seconds: float | None  # None where a prefill chunk shared the pass, which says nothing of a step's latency
    rows: int  # token positions of the pass, without a prefill chunk's
    growth: float | None = None  # what the pass has read, in passes of one position; None where nobody says
    host_seconds: float = 0.0  # of the step beside its pass and the drafting: a longer one with drafts to take


class Control:
    """Decides each step: `bets`, then the drafters propose, `trim`, the forward pass, `observe`. This base: always
    the maximum.

    drafter: the drafter's name.
    """

    needs = Needs()
    is_new: bool = False  # it asks for `calibrate`

    def __init__(self, drafter: str) -> None:
        self.drafter = drafter

    def bets(self, sessions: Sequence[Writing], most: Sequence[int]) -> list[Bet]:
        """One bet per session, of at most `most[i]` tokens."""
        return [Bet(self.drafter, limit) for limit in most]

    def trim(self, sessions: Sequence[Writing], bets: Sequence[Bet], drafts: Sequence[Draft]) -> list[Draft]:
        """The drafts without the nodes that aren't worth their positions. A draft that is `whole` isn't cut."""
        return list(drafts)

    def observe(self, step: Step) -> None:
        """Learn from a step."""

    def price_by(self, growth: Callable[[float], float]) -> None:
        """Take what a pass of so many token positions is expected to read, in passes of one position."""

    def calibrate(self, rows: int, seconds: float, growth: float | None = None) -> None:
        """Learn a pass's latency by its token positions and what it has read, before the first step."""

    def resting(self) -> list[str]:
        """The drafters that have long brought nothing to any sequence."""
        return []

    def forget(self, drafter: str) -> None:
        """Bet on it no more: it isn't loaded any longer."""

    def report(self) -> dict[str, Any]:
        """The state for a later run to begin with, as JSON."""
        return {}


Fixed = Control


Limits = Sequence[tuple[float, int]]
"""Nats, rising, each with tokens, falling: behind a distribution of at most so many nats at most so many are drafted,
and behind more than the last none.
"""


class Entropy(Control):
    """Drafts the fewer tokens, the less sure the target was of its last one. Cerberus's gate (2410.13344) drafts all or
    none; `longspec tune` fits limits to a model.
    """

    needs = Needs(entropy=True)
    MOST = 100.0  # nats: more than any vocabulary has
    LIMITS: Limits = ((1.0, 10), (MOST, 8))  # of a model that wasn't tuned

    def __init__(self, drafter: str, limits: Limits = LIMITS) -> None:
        super().__init__(drafter)
        self.limits = limits
        self._last: WeakKeyDictionary[Writing, float] = WeakKeyDictionary()

    def bets(self, sessions: Sequence[Writing], most: Sequence[int]) -> list[Bet]:
        allowed = [self._allowed(self.entropy_of(session)) for session in sessions]
        return [
            Bet("", 0, "unsure") if own == 0 else Bet(self.drafter, limit if own is None else min(own, limit))
            for own, limit in zip(allowed, most, strict=True)
        ]

    def _allowed(self, entropy: float | None) -> int | None:
        """Tokens; None where nothing is known yet."""
        return None if entropy is None else next((tokens for nats, tokens in self.limits if entropy <= nats), 0)

    def entropy_of(self, session: Writing) -> float | None:
        """Nats of the distribution of the session's last token; None before its first step."""
        return self._last.get(session)

    def observe(self, step: Step) -> None:
        for outcome in step.outcomes:
            if outcome.verdict.entropy is not None:
                self._last[outcome.session] = outcome.verdict.entropy
