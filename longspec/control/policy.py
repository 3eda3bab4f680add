"""How much to bet, each step: which drafter, how many tokens at most, and which of the drafted ones are worth a row.

Takes what steps cost and kept, and gives limits; knows no model and no clock. A control never sees the text: a bad one
costs time and nothing else.

The default is `longspec.control.goodput`; here are the seam and the rules that need no learning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

from longspec.types import Draft, Writing

__all__ = ["Bet", "Confident", "Control", "Fixed", "Outcome", "Step", "Sure", "chances", "first"]


class Bet(NamedTuple):
    """What a session's draft may be: up to `limit` tokens of a drafter; none where it is 0."""

    drafter: str
    limit: int
    probe: bool = False  # made to learn something: it isn't trimmed


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one session's bet."""

    session: Writing
    bet: Bet
    draft: Draft  # as it was verified
    kept: Sequence[int]  # its nodes that were kept
    entropy: float | None = None  # nats of softmax(logits) where the bonus was chosen, for a control that asks


@dataclass(frozen=True, slots=True)
class Step:
    """What a step brought and took."""

    outcomes: Sequence[Outcome]
    draft_seconds: Mapping[str, float]  # of each drafter that was asked
    pass_seconds: float | None  # None where a chunk of a prompt shared the pass: it tells nothing of a step's cost
    rows: int  # of the pass, such a chunk's not counted


class Control(Protocol):
    """Decides each step: `bets`, then drafting, `trim`, the pass, `observe`."""

    @property
    def entropies(self) -> bool:
        """Whether outcomes should have their entropy: it costs a pass over the logits."""
        ...

    def bets(self, sessions: Sequence[Writing], rooms: Sequence[int]) -> list[Bet]:
        """One for each session, of at most `rooms[i]` tokens."""
        ...

    def trim(self, bets: Sequence[Bet], drafts: Sequence[Draft]) -> list[Draft]:
        """The drafts without nodes that aren't worth their rows. One that says so stays whole."""
        ...

    def observe(self, step: Step) -> None: ...


class Fixed:
    """Always as much as there is room for."""

    entropies = False

    def __init__(self, drafter: str) -> None:
        self.drafter = drafter

    def bets(self, sessions: Sequence[Writing], rooms: Sequence[int]) -> list[Bet]:
        return [Bet(self.drafter, room) for room in rooms]

    def trim(self, bets: Sequence[Bet], drafts: Sequence[Draft]) -> list[Draft]:
        return list(drafts)

    def observe(self, step: Step) -> None:
        pass


class Confident(Fixed):
    """Only nodes that their drafter gives a path's chance of `floor` at least (EAGLE-2's confidences, 2406.16858)."""

    def __init__(self, drafter: str, floor: float = 0.3) -> None:
        super().__init__(drafter)
        self.floor = floor

    def trim(self, bets: Sequence[Bet], drafts: Sequence[Draft]) -> list[Draft]:
        return [first(draft, sum(chance >= self.floor for chance in chances(draft) or [1.0] * len(draft)))
                for draft in drafts]  # fmt: skip


class Sure(Fixed):
    """No bet where the target's last distribution had more than `most` nats (Cerberus's gate, 2410.13344)."""

    entropies = True

    def __init__(self, drafter: str, most: float = 2.0) -> None:
        super().__init__(drafter)
        self.most = most
        self._last: WeakKeyDictionary[Writing, float] = WeakKeyDictionary()

    def bets(self, sessions: Sequence[Writing], rooms: Sequence[int]) -> list[Bet]:
        return [
            Bet(self.drafter, room if self._last.get(session, 0.0) <= self.most else 0)
            for session, room in zip(sessions, rooms, strict=True)
        ]

    def observe(self, step: Step) -> None:
        for outcome in step.outcomes:
            if outcome.entropy is not None:
                self._last[outcome.session] = outcome.entropy


def chances(draft: Draft) -> list[float] | None:
    """[n]: each node's and never above an earlier one's, so that the nodes above any floor are the first ones."""
    if draft.chances is None:
        return None
    lowest, falling = 1.0, []
    for chance in draft.chances.tolist():
        lowest = min(lowest, chance)
        falling.append(lowest)
    return falling


def first(draft: Draft, nodes: int) -> Draft:
    """Its first nodes, which are a draft too, unless it is to stay whole."""
    if nodes >= len(draft) or draft.whole:
        return draft
    kept = None if draft.chances is None else draft.chances[:nodes]
    return Draft(draft.tokens[:nodes], draft.parents[:nodes], kept)
