"""Bets what brings the most tokens per second, by what earlier bets cost and brought; nothing is one of the bets.

Takes measured steps and gives limits; knows no model, no clock and no text. The best draft length is a property of
batch size, context and text, and changes with them (Su et al., 2310.18813); so it is found while running, by measured
goodput (Nightjar, 2512.22420), and chosen anew in each step:

- A second has a price: the tokens that recent steps brought per second. The best bet has the most expected tokens
  beyond the price of its seconds. The best draft ends where a node is worth less than its row: trees grow by gain over
  cost in Lever (2605.16786), by the chance of a path in EAGLE-2 (2406.16858); here over all sessions of the pass.
- A drafter that isn't in use is probed by short drafts, the more rarely the more of them lose; a probe that wins makes
  what was known before doubtful. Accounts bound what losing bets may take, whatever the text does. What a drafter must
  catch up is part of its price (Nightjar's cost of switching).
- Now and then a step is made without a bet, so that it is known what that costs.
- Where nothing is worth a bet and no probe is due, it rests for some steps: to think costs 0.1 ms a step, and a pass of
  the default model 3.3.

Letters: B sessions, n nodes of a draft, m a limit. A plain pass has B rows: what the step would cost without a bet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from longspec.control.acceptance import Record
from longspec.control.latency import Costs, Curve
from longspec.control.policy import Bet, Outcome, Step, chances, first
from longspec.types import Draft, Writing

__all__ = ["Goodput"]

_PROBES, _CREDIT = 0.01, (1.0, 3.0)
"""What probes may lose: a share of all time. The account's plain passes at first, and at most."""

_LOSSES, _LOCK = 0.01, 8.0
"""What bets may lose that promised to win: a share of all time, and plain passes beyond it at once."""

_FREE = 0.2  # of a pass: a whole limit for less of it is asked for (with 0.03 a head brought 1.30 times, not 1.55)
_WAIT = 48  # steps between two probes at most
_PROBE = 4  # tokens, where they cost less than a quarter of a pass; else one
_CATCHING_UP = 16  # steps that a drafter is expected to stay in use: what it must catch up is spread over them
_EARLY, _OFTEN, _SELDOM = 5, 16, 128  # steps between two plain ones: at first, where bets win little, and much
_RECENT = 1 / 32
_REST = 4  # steps without a thought at most


@dataclass(slots=True, eq=False)
class _Hand:
    """One drafter's bets on one session."""

    record: Record
    due: int = 0  # the step of the next probe
    wait: int = 1
    asked: int = 0  # tokens of the text when the drafter was last asked
    # By limit: tokens beyond the rows' price, at best, and the m of it.
    best: list[tuple[float, int]] = field(default_factory=list)


class Goodput:
    """The control of `--drafter auto` and the default of every other.

    drafters: the names to choose from. most: the largest limit. learned: a `report` of an earlier run, from a file that
    may hold anything.
    """

    entropies = False

    def __init__(self, drafters: Sequence[str], most: int, learned: Mapping[str, Any] | None = None) -> None:
        self.costs = Costs(learned)
        kept = (learned or {}).get("kept")
        stored = kept if isinstance(kept, Mapping) else {}
        self._pools = {name: Record.of(most, stored.get(name)) for name in drafters}
        self._ladder = [*(m for m in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if m < most), most]
        self._hands: WeakKeyDictionary[Writing, dict[str, _Hand]] = WeakKeyDictionary()
        self._nodes: WeakKeyDictionary[Writing, float] = WeakKeyDictionary()  # of recent drafts
        self._steps = self._plain = 0  # and the last one without a bet
        self._wakes = self._probes = 0  # the step that ends a rest, and the one that may be the next probe's
        self._rested, self._rests = 0, False  # steps of a rest, and whether this is one
        self._wait = _SELDOM if self.costs.report()["passes"] else _EARLY
        self._credit, self._debt = _CREDIT[0], 0.0  # plain passes
        self._brought = self._took = 1.0  # by recent steps, in plain steps
        # Of the step that is being made:
        self._curve = Curve()
        self._price = 1.0  # tokens per second that a bet must beat
        self._batch: list[dict[str, _Hand]] = []
        self._forgone: list[float | None] = []  # tokens of the bets that were given up for probes; None: there was none
        self._whole: list[int] = []  # nodes before trimming

    def report(self) -> dict[str, Any]:
        """What a later run may begin with."""
        return {**self.costs.report(), "kept": {name: pool.report() for name, pool in self._pools.items()}}

    def bets(self, sessions: Sequence[Writing], rooms: Sequence[int]) -> list[Bet]:
        self._steps += 1
        size, batch = len(sessions), [self._hands_of(session) for session in sessions]
        self._rests = self._steps < self._wakes and batch == self._batch
        if self._rests:
            return [Bet("", 0)] * size
        self._curve = curve = self.costs.curve(size, sum(len(session.tokens) for session in sessions) // size)
        self._batch = batch
        self._whole = [0] * size
        self._price = max(1.0, self._brought / self._took) * size / curve.seconds(size)
        nodes = [self._nodes.get(session, 0.0) for session in sessions]
        total = size + sum(nodes)
        for session, hands, room, own in zip(sessions, self._batch, rooms, nodes, strict=True):
            self._weigh(session, hands, room, max(1.0, total - own))
        chosen, values = [Bet("", 0)] * size, [0.0] * size
        if self._debt > -_LOCK:
            self._choose(chosen, values)
        self._forgone = [None] * size
        wait = self._wait if sum(values) > size / 4 else min(self._wait, _OFTEN)
        if self._steps - self._plain >= wait:
            return [Bet("", 0)] * size
        self._probe(sessions, rooms, chosen, values, total)
        return chosen

    def _hands_of(self, session: Writing) -> dict[str, _Hand]:
        hands = self._hands.get(session)
        if hands is None:
            most = self._ladder[-1]
            self._hands[session] = hands = {
                name: _Hand(Record(most, pool), due=self._steps) for name, pool in self._pools.items()
            }
        return hands

    def _weigh(self, session: Writing, hands: Mapping[str, _Hand], room: int, others: float) -> None:
        """Each drafter's best limit up to any other, not counting its drafting. others: rows beside the draft."""
        price, seconds = self._price, self._curve.seconds
        without = seconds(others)
        for name, hand in hands.items():
            behind = max(0, len(session.tokens) - hand.asked)
            drafting = self.costs.drafting(name, without)
            start = price * (without - drafting.behind * behind / _CATCHING_UP)
            keeps, rows = hand.record.yields()
            # What is drafted for little and says what it thinks of each node is asked for all, and trimmed.
            whole = hand.record.ranked and drafting.token * room < _FREE * without
            best, at = 1e-9, 0
            hand.best = []
            for m in self._ladder:
                if m > room:
                    m = room
                if (value := start + keeps[m] - price * seconds(others + rows[m])) > best:
                    best, at = value, m
                hand.best.append((best, room if whole else at) if at else (0.0, 0))

    def _choose(self, chosen: list[Bet], values: list[float]) -> None:
        """Give drafters to sessions, as long as that is worth drafting: its seconds are shared by those who bet."""
        price, plain = self._price, self._curve.seconds(1)
        left = list(self._pools)
        while left:
            most, best, to = 0.0, "", 0
            for name in left:
                drafting = self.costs.drafting(name, plain)
                for place in range(len(self._ladder)):
                    gain = -price * drafting.seconds(max(hands[name].best[place][1] for hands in self._batch))
                    for hands, value in zip(self._batch, values, strict=True):
                        gain += max(0.0, hands[name].best[place][0] - value)
                    if gain > most:
                        most, best, to = gain, name, place
            if not best:
                return
            left.remove(best)
            for i, hands in enumerate(self._batch):
                value, limit = hands[best].best[to]
                if value > values[i]:
                    chosen[i], values[i] = Bet(best, limit), value

    def _probe(
        self, sessions: Sequence[Writing], rooms: Sequence[int], chosen: list[Bet], values: list[float], total: float
    ) -> None:
        """Try what isn't in use, as far as the account allows."""
        size, credit, plain = len(sessions), self._credit, self._curve.seconds(len(sessions))
        users = Counter(bet.drafter for bet in chosen if bet.limit)
        row = max(0.0, self._curve.seconds(total + 1) - self._curve.seconds(total))
        self._probes = self._steps + _WAIT
        for i, (session, hands) in enumerate(zip(sessions, self._batch, strict=True)):
            old = chosen[i]
            forgone = None
            if old.limit:
                saved = self.costs.drafting(old.drafter, plain).seconds(old.limit) * self._price / users[old.drafter]
                forgone = max(0.0, values[i] - saved)
            for name, hand in hands.items():
                if hand.due > self._steps or name == old.drafter or not rooms[i]:
                    self._probes = min(self._probes, hand.due)
                    continue
                drafting, behind = self.costs.drafting(name, plain), max(0, len(session.tokens) - hand.asked)
                for m in (min(_PROBE, rooms[i]), 1):
                    cost = (row * m + (0.0 if name in users else drafting.seconds(m, behind))) / plain
                    if cost < 0.25:
                        break
                cost = min(cost + (forgone or 0.0) / size, _CREDIT[1])  # more than that waits until no more is saved
                if cost <= credit:
                    credit -= cost
                    chosen[i], self._forgone[i] = Bet(name, m, probe=True), forgone
                    users[name] += 1
                    break
                self._probes = min(self._probes, self._steps + 1 + int((cost - credit) / _PROBES))

    def trim(self, bets: Sequence[Bet], drafts: Sequence[Draft]) -> list[Draft]:
        if self._rests:
            return list(drafts)
        self._whole = [len(draft) for draft in drafts]
        worth, rows = [], len(drafts)  # of the nodes that may go: (-tokens, session)
        for i, (bet, draft) in enumerate(zip(bets, drafts, strict=True)):
            if bet.probe or draft.whole:
                rows += len(draft)
            elif len(draft):
                record, given = self._batch[i][bet.drafter].record, chances(draft)
                lowest = 1.0
                for chance in record.places(len(draft)) if given is None else map(record.chance, given):
                    lowest = min(lowest, chance)
                    worth.append((-lowest, i))
        worth.sort()
        price, seconds = self._price, self._curve.seconds
        most, best, value = 0, 0.0, price * seconds(rows)
        for place, (loss, _) in enumerate(worth, 1):
            value -= loss
            if (gain := value - price * seconds(rows + place)) > best:
                most, best = place, gain
        keep = [0] * len(drafts)
        for _, i in worth[:most]:
            keep[i] += 1
        return [
            draft if bet.probe else first(draft, nodes) for bet, draft, nodes in zip(bets, drafts, keep, strict=True)
        ]

    def observe(self, step: Step) -> None:
        if self._rests:
            self._rested += 1
            return
        size, seconds = len(step.outcomes), self._curve.seconds
        if step.pass_seconds is not None and not any(outcome.draft.begun is not None for outcome in step.outcomes):
            self._curve.observe(step.rows, step.pass_seconds)
            if not any(len(outcome.draft) for outcome in step.outcomes):
                self._plain, self._wait = self._steps, min(4 * self._wait, _SELDOM)
        plain, drafting = seconds(size), self._observe_drafting(step)
        kept = sum(len(outcome.kept) for outcome in step.outcomes)
        took = (seconds(step.rows) + sum(drafting.values())) / plain
        rested, self._rested = self._rested, 0
        recent = _RECENT * (1 + rested)
        self._brought += recent * (1 + kept / size - self._brought)
        self._took += recent * (took - self._took)
        lost = took - 1 - kept / size
        users = Counter(outcome.bet.drafter for outcome in step.outcomes)
        for i, outcome in enumerate(step.outcomes):
            if outcome.bet.probe:
                cost = seconds(step.rows) - seconds(step.rows - len(outcome.draft))
                cost += drafting.get(outcome.bet.drafter, 0.0) / users[outcome.bet.drafter]
                net = cost / plain - len(outcome.kept) / size
                lost -= max(0.0, net)
                self._credit -= max(0.0, net + (self._forgone[i] or 0.0) / size)
            self._learn(outcome, self._batch[i], self._whole[i], self._forgone[i] is not None)
        self._credit = min(_CREDIT[1], self._credit + _PROBES * (rested + took))
        self._debt = min(0.0, self._debt - lost + _LOSSES * (rested + took))
        if not any(outcome.bet.limit for outcome in step.outcomes):
            self._wakes = min(self._steps + 1 + _REST, self._probes)

    def _observe_drafting(self, step: Step) -> dict[str, float]:
        """What each drafter that was asked is expected to have taken: as measured, without a moment's noise."""
        expected = {}
        for name, seconds in step.draft_seconds.items():
            asked = [(o, hands) for o, hands in zip(step.outcomes, self._batch, strict=True)
                     if o.bet.drafter == name and o.bet.limit]  # fmt: skip
            if not asked:
                continue
            if any(outcome.draft.begun is not None for outcome, _ in asked):
                if step.pass_seconds is None:
                    continue
                # The rows' first layers were run while drafting: what counts is the time beyond a whole pass.
                seconds = max(0.0, seconds + step.pass_seconds - self._curve.seconds(step.rows))
            limit = max(outcome.bet.limit for outcome, _ in asked)
            behind = sum(len(o.session.tokens) - len(o.kept) - 1 - hands[name].asked for o, hands in asked)
            drafting = self.costs.drafting(name, self._curve.seconds(1))
            drafting.observe(limit, max(0, behind), seconds)
            expected[name] = drafting.seconds(limit, max(0, behind))
            for outcome, hands in asked:
                hands[name].asked = len(outcome.session.tokens)
        return expected

    def _learn(self, outcome: Outcome, hands: Mapping[str, _Hand], whole: int, used: bool) -> None:
        """used: the probe took the place of another bet."""
        bet, n, session = outcome.bet, len(outcome.draft), outcome.session
        self._nodes[session] = (self._nodes.get(session, 0.0) + n) / 2
        if not bet.limit:
            return
        hand, given, parents = hands[bet.drafter], chances(outcome.draft), outcome.draft.parents.tolist()
        for record in (hand.record, self._pools[bet.drafter]):
            if bet.probe and outcome.kept and not used and (record is hand.record or len(self._batch) == 1):
                record.doubt()
            record.observe(bet.limit, outcome.kept, parents, given, n < whole)
        if not bet.probe or (outcome.kept and not used):
            hand.wait = 1
        elif n:
            hand.wait = min(2 * hand.wait, _WAIT)
        hand.due = self._steps + hand.wait
