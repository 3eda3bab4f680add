"""What is drafted in a step: by whom, how much, behind which forced tokens; and what came of it.

Takes drafters by name and a control; gives a draft for each session, and after the verification tells control and
drafters what was kept. The engine knows no more of drafting than this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from time import perf_counter

from torch import Tensor

from longspec.control.policy import Bet, Control, Outcome, Step
from longspec.engine.session import Session
from longspec.types import Commit, Draft, Drafter, Needs, Verdict

__all__ = ["Speculator"]


@dataclass(frozen=True, slots=True)
class _Pending:
    """One session's part of the step under way."""

    session: Session
    bet: Bet
    why: str  # there is no draft, if there is none
    own: Draft  # the drafter's, trimmed
    forced: int  # tokens of the draft before it, which a constraint leaves no choice of


class Speculator:
    """drafters: by name, the first is tried first. most: tokens of a draft."""

    def __init__(self, drafters: Mapping[str, Drafter], control: Control, most: int) -> None:
        self.drafters = dict(drafters)
        self.control = control
        self.most = most
        self.everyone = [*_walk(self.drafters.values())]
        self.needs: Needs = reduce(or_, (drafter.needs for drafter in self.everyone), control.needs)
        self.drafts_forced = [*drafters] != ["none"]  # plain decoding drafts no forced tokens either
        self._pending: list[_Pending] = []
        self._seconds: dict[str, float] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all drafters' weights and tables."""
        return sum(drafter.nbytes for drafter in self.everyone)

    def begin(self, session: Session) -> None:
        """A session is opened."""
        for drafter in self.drafters.values():
            drafter.begin(session)

    def propose(self, sessions: Sequence[Session]) -> list[Draft]:
        """A draft for each session, of at most `most` tokens, and one less than the answer may still get."""
        limits = [min(self.most, session.room - 1) for session in sessions]
        guides = [session.constraint if self.drafts_forced else None for session in sessions]
        forced = [guide.forced(limit) if guide else [] for guide, limit in zip(guides, limits, strict=True)]
        left = [limit - len(ahead) for limit, ahead in zip(limits, forced, strict=True)]
        bets = self.control.bets(sessions, left)
        drafts = self._drafts(sessions, bets, forced)
        trimmed = self.control.trim(sessions, bets, drafts)
        self._pending = [
            _Pending(session, bet, _why(bet, draft), kept, len(ahead))
            for session, bet, draft, kept, ahead in zip(sessions, bets, drafts, trimmed, forced, strict=True)
        ]
        whole = zip(guides, trimmed, forced, limits, strict=True)
        return [guide.extend(draft, ahead, limit) if guide else draft for guide, draft, ahead, limit in whole]

    def _drafts(self, sessions: Sequence[Session], bets: Sequence[Bet], forced: Sequence[list[int]]) -> list[Draft]:
        """Each session's draft by its bet, behind what is forced, without what a grammar forbids."""
        drafts, self._seconds = [Draft.chain(()) for _ in sessions], {}
        for name, drafter in self.drafters.items():
            asked = [i for i, bet in enumerate(bets) if bet.drafter == name and bet.limit > 0]
            if not asked:
                continue
            began = perf_counter()
            ahead = [forced[i] for i in asked]
            limits = [bets[i].limit for i in asked]
            proposed = drafter.propose([sessions[i] for i in asked], limits, ahead if any(ahead) else None)
            self._seconds[name] = perf_counter() - began
            for i, draft in zip(asked, proposed, strict=True):
                constraint = sessions[i].constraint
                drafts[i] = constraint.prune(draft, forced[i]) if constraint else draft
        return drafts

    def read(self, session: Session, features: Mapping[int, Tensor]) -> None:
        """Token positions were committed: hidden states [m, width] of the layers that drafters need."""
        for drafter in self.everyone:
            if drafter.needs.layers:
                drafter.read(session, [features[layer] for layer in drafter.needs.layers])

    def observe(
        self, commits: Sequence[Commit], verdicts: Sequence[Verdict], seconds: float, rows: int, *, shared: bool
    ) -> None:
        """The step's drafts are verified and committed. seconds: of the forward pass, with so many token positions;
        shared: a chunk of a prompt was in it too.
        """
        outcomes = []
        for pending, commit, verdict in zip(self._pending, commits, verdicts, strict=True):
            session, first, count = pending.session, pending.forced, len(pending.own)
            session.drafting += sum(self._seconds.values())
            session.verifying += seconds
            session.bets[pending.bet.drafter if count else f"none: {pending.why}"] += 1
            with session.keeping_error():
                for drafter in self.drafters.values():
                    drafter.observe(session, commit, verdict)
            kept = [node - first for node in verdict.kept if first <= node < first + count]
            outcomes.append(Outcome(session, pending.bet, pending.own, kept, verdict))
        self.control.observe(Step(outcomes, self._seconds, None if shared else seconds, rows))
        self._pending = []


def _walk(drafters: Iterable[Drafter]) -> Iterator[Drafter]:
    """They, and the drafters that they are made of."""
    for drafter in drafters:
        yield drafter
        yield from _walk(drafter.parts)


def _why(bet: Bet, draft: Draft) -> str:
    """The reason for a step without a draft: the control's, the drafter's, or that no node was worth its position."""
    if not bet.limit:
        return bet.why
    return "not worth it" if len(draft) else "nothing found"
