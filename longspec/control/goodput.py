"""The default control: maximises tokens per second from measured latency and acceptance.

Takes measured steps and gives limits; knows no model, no clock and no text. The best draft length depends on batch
size, context and text (Su et al., 2310.18813), so it is decided anew in each step, by measured goodput (2512.22420):

- A drafter gets the limit whose expected tokens exceed the opportunity cost of their seconds most, if any does. A
  second costs the tokens that recent steps gave per second.
- A draft is cut where a node's probability is below the marginal cost of its position in the pass, which in a mixture
  is mostly that of experts that no other position reads: nodes of all sessions in order of calibrated probability
  against the marginal latency (EAGLE-2, 2406.16858, and Lever, 2605.16786, grow trees so).
- One back-off: a drafter whose drafts lost two tokens' time on a sequence, or have no expected gain, pauses there,
  for twice as many steps each time; then it is tried again. A new sequence begins with the pause that the last one
  had reached, and so does a new run: where nothing paid the last time it begins at rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from longspec.control.acceptance import Acceptance
from longspec.control.latency import Curve, DraftCost
from longspec.control.policy import Bet, Control, Outcome, Step
from longspec.types import Draft, Writing

__all__ = ["Goodput"]

_LIMITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_PRIOR = 0.05  # prior cost of a draft, and of each of its tokens, in plain passes
_CHEAP = 0.2  # in plain passes: below it the full limit is asked for, and then cut
_LOSS, _FIRST, _AGAIN = 3.0, 1.0, 0.6  # tokens that drafts may lose: half of it all, at first, after a pause
_PAUSE, _FRESH = 128, 8  # steps: the longest, and the longest that a new text begins with
_RESTING = 16  # steps of a pause: four in a row have ended with nothing won
_PROBE = 4  # tokens of an exploratory draft
_PROBES = 0.01  # of the time, for such drafts at most
_PLAIN = (4, 128)  # steps without drafts, to measure the gain: the first one, and the interval
_RECENT = 1 / 32


@dataclass(slots=True, eq=False)
class _Trial:
    """One drafter's state on one sequence."""

    acceptance: Acceptance
    account: float = _FIRST - _LOSS  # tokens gained over plain decoding, at most `_LOSS`; it pauses below `-_LOSS`
    pause: int = 1  # steps of the next pause
    due: int = 0  # the step that ends the current pause


class Goodput(Control):
    """The default control.

    drafters: names, in the order in which they are tried. most: the maximum tokens of a draft. learned: a `report` of
    an earlier run, from a file that isn't trusted.
    """

    def __init__(self, drafters: Sequence[str], most: int, learned: Mapping[str, Any] | None = None) -> None:
        super().__init__(drafters[0])
        self._limits = [*(limit for limit in _LIMITS if limit < most), most]
        self._curve = Curve.of((learned or {}).get("passes"))
        self.is_new = not self._curve.report()
        self._plain = _PLAIN[1] if (learned or {}).get("passes") else _PLAIN[0]  # the next step without drafts
        self._pools = {name: Acceptance() for name in drafters}
        self._costs: dict[str, DraftCost] = {}
        self._pauses = _pauses((learned or {}).get("pauses"))  # of drafters of earlier runs
        self._latest = {name: _Trial(pool, pause=self._pauses.get(name, 1)) for name, pool in self._pools.items()}
        self._trials: WeakKeyDictionary[Writing, dict[str, _Trial]] = WeakKeyDictionary()
        self._gone: set[str] = set()  # drafters that aren't loaded any longer
        self._steps, self._nodes = 0, 0.0  # steps so far; moving average of a session's draft nodes
        self._brought = self._took = 1.0  # moving averages: tokens, and time in plain steps
        self._host = [0.0, 0.0]  # moving averages: a session's `host_seconds` without and with a draft
        self._price = 1.0  # tokens per second, the price of latency
        self._probe = 0  # tokens of this step's probe, until a session takes it
        self._next_probe = 0  # the step from which on there may be one
        self._probing = 1  # steps from one to the next

    def price_by(self, growth: Callable[[float], float]) -> None:
        self._curve.growth = growth

    def calibrate(self, rows: int, seconds: float, growth: float | None = None) -> None:
        self._curve.measure(rows, seconds, growth)

    def report(self) -> dict[str, Any]:
        pauses = {name: trial.pause for name, trial in self._latest.items()}
        return {"passes": self._curve.report(), "pauses": {**self._pauses, **pauses}}

    def resting(self) -> list[str]:
        """Those that pause on every sequence, the last one for `_RESTING` steps at least."""
        known = list(self._trials.values())
        return [
            name
            for name, last in self._latest.items()
            if name not in self._gone
            and last.pause >= _RESTING
            and known
            and all(trials[name].due > self._steps for trials in known)
        ]

    def forget(self, drafter: str) -> None:
        self._gone.add(drafter)

    def bets(self, sessions: Sequence[Writing], most: Sequence[int]) -> list[Bet]:
        self._steps += 1
        size = len(sessions)
        plain = self._curve.seconds(size)
        self._price = max(1.0, self._brought / self._took) * size / plain
        dear = [self._curve.seconds(size + tokens) - plain for tokens in (1, _PROBE)]
        cheap = self._price * dear[1] < _PROBE / 16  # in tokens that a step brings
        self._probe = 0 if self._steps < self._next_probe else _PROBE if cheap else 1
        self._probing = 1 + int(dear[cheap] / (_PROBES * plain))
        if self._steps >= self._plain:
            return [Bet("", 0, "measuring")] * size
        return [self._bet(self._of(session), limit, size) for session, limit in zip(sessions, most, strict=True)]

    def _bet(self, trials: Mapping[str, _Trial], most: int, size: int) -> Bet:
        """The drafter and limit with the greatest expected gain; else a drafter whose pause is over."""
        best, bet = 0.0, Bet("", 0, "paused")
        if not most:
            return Bet("", 0, "at the end")
        for name, trial in trials.items():
            if trial.due > self._steps or name in self._gone:
                continue
            value, limit = self._worth(name, trial, most, size)
            if value > best and not trial.due:
                best, bet = value, Bet(name, limit)
            elif self._probe and not bet.limit:
                bet = Bet(name, min(self._probe, most), "probe")
        if bet.why == "probe":
            self._probe = 0  # one probe a step: the others wait
            self._next_probe = self._steps + self._probing
        return bet

    def _of(self, session: Writing) -> dict[str, _Trial]:
        if session not in self._trials:
            self._trials[session] = {
                name: _Trial(
                    Acceptance(self._pools[name]),
                    pause=min(last.pause, _FRESH),
                    due=self._steps + min(last.pause, _FRESH) if last.pause > 1 else 0,
                )
                for name, last in self._latest.items()
            }
        return self._trials[session]

    def _worth(self, name: str, trial: _Trial, most: int, size: int) -> tuple[float, int]:
        """The expected gain of the drafter's best limit, in tokens beyond the price of its seconds; and the limit."""
        seconds, cost = self._curve.seconds, self._cost(name)
        before = size + self._nodes * (size - 1)  # the pass's other positions
        without, rate = seconds(before), trial.acceptance.rate
        best, at, expected = -1e9, 1, 0.0
        for limit in self._limits:
            limit = min(limit, most)
            expected = limit if rate >= 1 else rate * (1 - rate**limit) / (1 - rate)
            spent = seconds(before + limit) - without + cost.seconds(limit) / size + self._taking
            value = expected - self._price * spent
            if value > best:
                best, at = value, limit
        whole = trial.acceptance.has_probs and cost.token * most < _CHEAP * without
        return best, most if whole else at

    @property
    def _taking(self) -> float:
        """Seconds that taking a draft's tokens adds to a step."""
        return max(0.0, self._host[1] - self._host[0])

    def _cost(self, name: str) -> DraftCost:
        """What the drafter was seen to cost; before that, a share of a pass, in the units that passes have now."""
        prior = _PRIOR * self._curve.seconds(1)
        return self._costs.get(name) or DraftCost(prior, prior)

    def trim(self, sessions: Sequence[Writing], bets: Sequence[Bet], drafts: Sequence[Draft]) -> list[Draft]:
        nodes: list[tuple[float, int]] = []  # (-probability, session) of the prunable nodes
        rows = len(drafts)
        for i, (session, bet, draft) in enumerate(zip(sessions, bets, drafts, strict=True)):
            if bet.why or draft.whole or draft.probs is None:
                rows += len(draft)
                continue
            acceptance, lowest = self._of(session)[bet.drafter].acceptance, 1.0
            for prob in acceptance.probabilities(draft.probs.tolist()):
                lowest = min(lowest, prob)
                nodes.append((-lowest, i))
        nodes.sort()
        best, count, value, seconds = 0.0, 0, 0.0, self._curve.seconds
        without = seconds(rows)
        for place, (loss, _) in enumerate(nodes, 1):
            value -= loss
            if (gain := value - self._price * (seconds(rows + place) - without)) > best:
                best, count = gain, place
        keep = [len(draft) for draft in drafts]
        for _, i in nodes[count:]:
            keep[i] -= 1
        return [draft.first(length) for draft, length in zip(drafts, keep, strict=True)]

    def observe(self, step: Step) -> None:
        size, curve = len(step.outcomes), self._curve
        begun = any(outcome.draft.begun is not None for outcome in step.outcomes)
        if step.pass_seconds is not None and not begun:
            curve.observe(step.rows, step.pass_seconds, step.growth)
            if not any(outcome.bet.limit for outcome in step.outcomes):
                self._plain = self._steps + _PLAIN[1]
            drafts, host = any(len(outcome.draft) for outcome in step.outcomes), step.host_seconds / size
            known = self._host[drafts] or host
            self._host[drafts] = known + _RECENT * (
                min(host, 2 * known) - known
            )  # another process's time is an outlier
        drafting = self._observe_drafting(step, begun=begun)
        kept = sum(len(outcome.kept) for outcome in step.outcomes)
        plain = curve.seconds(size)
        self._brought += _RECENT * (1 + kept / size - self._brought)
        self._took += _RECENT * ((curve.seconds(step.rows) + sum(drafting.values())) / plain - self._took)
        for outcome in step.outcomes:
            n = len(outcome.draft)
            self._nodes += _RECENT * (n - self._nodes)
            if not outcome.bet.limit:
                continue
            users = sum(other.bet.drafter == outcome.bet.drafter for other in step.outcomes)
            spent = curve.seconds(step.rows) - curve.seconds(step.rows - n) + drafting[outcome.bet.drafter] / users
            spent += self._taking if n else 0.0
            self._learn(outcome, len(outcome.kept) - spent * size / plain)

    def _observe_drafting(self, step: Step, *, begun: bool) -> dict[str, float]:
        """Each drafter's expected seconds of drafting, updated by this step's measurement (smoothed)."""
        expected = {}
        for name, seconds in step.draft_seconds.items():
            limit = max(outcome.bet.limit for outcome in step.outcomes if outcome.bet.drafter == name)
            if begun and step.pass_seconds is not None:
                # The drafter ran the pass's first layers: count only the time beyond a whole pass.
                seconds = max(0.0, seconds + step.pass_seconds - self._curve.seconds(step.rows))
            cost = self._costs[name] = self._cost(name)
            cost.observe(limit, seconds)
            expected[name] = cost.seconds(limit)
        return expected

    def _learn(self, outcome: Outcome, won: float) -> None:
        """Update the drafter's account. won: tokens that the draft gained over plain decoding in its time."""
        name, trial = outcome.bet.drafter, self._of(outcome.session)[outcome.bet.drafter]
        probs, parents = outcome.draft.probs, outcome.draft.parents.tolist()
        surprise = bool(outcome.kept) and outcome.bet.why == "probe"
        for acceptance in (trial.acceptance, self._pools[name]):
            if surprise and acceptance is trial.acceptance:
                acceptance.doubt()
            acceptance.observe(outcome.kept, parents, None if probs is None else probs.tolist())
        trial.account = min(_LOSS, trial.account + won)
        if won > 0 and trial.account > 0:
            trial.pause = 1
        failed = bool(parents) and outcome.bet.why == "probe" and not surprise and not trial.due
        if failed or trial.account < -_LOSS:
            trial.account = _AGAIN - _LOSS
            trial.due, trial.pause = self._steps + 1 + trial.pause, min(2 * trial.pause, _PAUSE)
        elif won > 0:
            trial.due = 0
        self._latest[name] = trial


def _pauses(stored: object) -> dict[str, int]:
    """The pauses of an earlier run's report; those that aren't valid are left out."""
    found = stored if isinstance(stored, Mapping) else {}
    return {str(name): pause for name, pause in found.items() if type(pause) is int and 1 <= pause <= _PAUSE}
