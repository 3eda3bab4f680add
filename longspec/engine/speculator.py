"""The drafting side of a step: which drafter, how many tokens, behind which forced tokens; and the feedback after it.

Takes drafters by name and a control; gives a draft for each session, and after verification tells control and
drafters which tokens were kept. The engine knows no more of drafting than this.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from time import perf_counter

from torch import Tensor

from longspec.constraints.matcher import Constraint
from longspec.constraints.thinking_budget import Guide
from longspec.control.policy import Bet, Control, Outcome, Step
from longspec.engine.session import Session
from longspec.errors import UsageError
from longspec.types import Commit, Draft, Drafter, Needs, Verdict

__all__ = ["Speculator"]


@dataclass(frozen=True, slots=True)
class _Pending:
    """One session's part of the current step."""

    session: Session
    bet: Bet
    why: str  # the reason for no draft; empty where there is one
    own: Draft  # the drafter's draft, trimmed
    forced: int  # leading tokens that the constraint determines


class Speculator:
    """drafters: by name, in the order in which they are tried. most: the maximum tokens of a draft."""

    def __init__(self, drafters: Mapping[str, Drafter], control: Control, most: int) -> None:
        self.drafters = dict(drafters)
        self.control = control
        self.most = most
        self._count()
        self.drafts_forced = [*drafters] != ["none"]  # plain decoding drafts no forced tokens either
        self._pending: list[_Pending] = []
        self._seconds: dict[str, float] = {}

    def _count(self) -> None:
        """Say who there is, and what they need of a pass."""
        self.everyone = [*_walk(self.drafters.values())]
        self.needs: Needs = reduce(or_, (drafter.needs for drafter in self.everyone), self.control.needs)

    @property
    def nbytes(self) -> int:
        """Bytes of all drafters' weights and tables."""
        return sum(drafter.nbytes for drafter in self.everyone)

    def give_back(self) -> str | None:
        """Let go of the drafter that holds the most memory of those that rest, for good, between two steps: its name
        (Nightjar, 2512.22420, which moves it to another device).
        """
        resting = [name for name in self.control.resting() if name in self.drafters]
        sizes = {name: sum(part.nbytes for part in _walk([self.drafters[name]])) for name in resting}
        if not any(sizes.values()):
            return None
        gone = max(sizes, key=lambda name: sizes[name])
        del self.drafters[gone]
        self.control.forget(gone)
        self._count()
        gc.collect()
        return gone

    def named(self, drafter: str | None) -> str | None:
        """The drafter's name. Raises UsageError: there is none of this name, and it isn't `none`."""
        if drafter in (None, "none") or drafter in self.drafters:
            return drafter
        raise UsageError(
            f"There is no drafter {drafter!r} here; use {' or '.join(dict.fromkeys(['none', *self.drafters]))}."
        )

    def begin(self, session: Session) -> None:
        """Tell every drafter that a session was opened."""
        for drafter in self.drafters.values():
            drafter.begin(session)

    def propose(self, sessions: Sequence[Session]) -> list[Draft]:
        """One draft per session, of at most `most` tokens, and one less than the answer may still get."""
        limits = [min(self.most, session.room - 1) for session in sessions]
        guides = [self._guide(session) for session in sessions]
        forced = [guide.forced(limit) if guide else [] for guide, limit in zip(guides, limits, strict=True)]
        left = [limit - len(ahead) for limit, ahead in zip(limits, forced, strict=True)]
        known = {"none", *self.drafters}  # one that a session asked for may have been given back since
        bets = [
            _asked(session.drafter, limit) if session.drafter in known else bet
            for session, bet, limit in zip(sessions, self.control.bets(sessions, left), left, strict=True)
        ]
        drafts = self._drafts(sessions, bets, forced)
        trimmed = self.control.trim(sessions, bets, drafts)
        self._pending = [
            _Pending(session, bet, _why(bet, draft), kept, len(ahead))
            for session, bet, draft, kept, ahead in zip(sessions, bets, drafts, trimmed, forced, strict=True)
        ]
        whole = zip(guides, trimmed, forced, limits, strict=True)
        return [guide.extend(draft, ahead, limit) if guide else draft for guide, draft, ahead, limit in whole]

    def _guide(self, session: Session) -> Constraint | Guide | None:
        """What forces tokens ahead of a draft; plain decoding drafts these neither."""
        return session.constraint if self.drafts_forced and session.drafter != "none" else None

    def _drafts(self, sessions: Sequence[Session], bets: Sequence[Bet], forced: Sequence[list[int]]) -> list[Draft]:
        """One draft per session, by its bet, after its forced tokens, pruned by its grammar."""
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
        """Pass the hidden states [m, width] of committed positions to the drafters, each of the
        layers that it needs.
        """
        for drafter in self.everyone:
            if drafter.needs.layers:
                drafter.read(session, [features[layer] for layer in drafter.needs.layers])

    def observe(
        self,
        commits: Sequence[Commit],
        verdicts: Sequence[Verdict],
        began: float,
        seconds: float,
        rows: int,
        *,
        shared: bool,
        growth: float | None,
    ) -> None:
        """Report the verified step to control and drafters. began: the step, on perf_counter's clock. seconds: of the
        forward pass, with `rows` token positions; shared: a prefill chunk was in it too; growth: what it has read, in
        passes of one position.
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
        host = perf_counter() - began - seconds - sum(self._seconds.values())
        self.control.observe(Step(outcomes, self._seconds, None if shared else seconds, rows, growth, host))
        self._pending = []


def _walk(drafters: Iterable[Drafter]) -> Iterator[Drafter]:
    """Yield each drafter and, recursively, its `parts`."""
    for drafter in drafters:
        yield drafter
        yield from _walk(drafter.parts)


def _asked(drafter: str | None, limit: int) -> Bet:
    """The bet of a session that names its drafter."""
    return Bet("none", 0, "none asked for") if drafter in (None, "none") else Bet(drafter, limit)


def _why(bet: Bet, draft: Draft) -> str:
    """The reason for a step without a draft: the control's, the drafter's, or that no node was worth its position."""
    if bet.drafter == "none":
        return "none asked for"
    if not bet.limit:
        return bet.why or "at the end"
    return "not worth it" if len(draft) else "nothing found"
