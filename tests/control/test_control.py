"""The controller, by simulation: drafters of known acceptance on a machine of known cost. No clock is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from longspec.control.acceptance import Acceptance
from longspec.control.goodput import Goodput
from longspec.control.latency import Curve
from longspec.control.policy import Bet, Fixed, Outcome, Step
from longspec.types import Draft, Verdict


class Text:
    """As much of a session as the controller sees."""

    def __init__(self, length: int = 100) -> None:
        self.tokens = list(range(length))

    key, long, cache, unfed, is_plain = "", False, None, (0,), True

    def rank(self, logits: Any, paths: Any, count: int, vocabulary: Any = None) -> Any:
        raise NotImplementedError


@dataclass
class Machine:
    """Passes cost 1 + slope * (rows - 1), or what `passes` says, a draft `start`, a drafted token `drafting`; times are
    off by a tenth, and seldom tenfold. sure: what drafts say of each node behind the one before it; None: nothing.
    taking: what a step with a draft takes beside its pass.
    """

    acceptance: dict[str, Callable[[int], float]]  # by drafter, of the tokens so far
    drafting: dict[str, float]
    slope: float = 0.03
    noise: float = 0.1
    start: float = 0.0
    sure: float | None = None
    taking: float = 0.0
    passes: Callable[[float], float] | None = None
    chaos: random.Random = field(default_factory=lambda: random.Random(5))

    def run(
        self, control: Any, tokens: int, sessions: int = 1, room: int = 32, texts: Sequence[Text] | None = None
    ) -> float:
        """Seconds for so many tokens of each session."""
        texts = texts or [Text() for _ in range(sessions)]
        sessions = len(texts)
        starts = [len(text.tokens) for text in texts]
        total = 0.0
        while (done := min(len(t.tokens) - s for t, s in zip(texts, starts, strict=True))) < tokens:
            bets = control.bets(texts, [room] * sessions)
            drafts = control.trim(texts, bets, [self.draft(bet.limit) for bet in bets])
            kept, rows, drafting = [], sessions, dict[str, float]()
            for bet, draft in zip(bets, drafts, strict=True):
                rate, count = self.acceptance.get(bet.drafter, steady(0.0))(done), 0
                while count < len(draft) and self.chaos.random() < rate:
                    count += 1
                kept.append(range(count))
                rows += len(draft)
                if bet.limit:  # all sessions draft in one pass of the drafter
                    seconds = self.start + self.drafting[bet.drafter] * bet.limit
                    drafting[bet.drafter] = max(drafting.get(bet.drafter, 0.0), seconds)
            true = self.passes(rows) if self.passes else 1 + self.slope * (rows - 1)
            seen = true * self.chaos.uniform(1 - self.noise, 1 + self.noise) * (10 if self.chaos.random() < 0.01 else 1)
            host = self.taking * any(map(len, drafts))
            total += true + sum(drafting.values()) + host
            verdict = Verdict((), 0)
            outcomes = [Outcome(*one, verdict) for one in zip(texts, bets, drafts, kept, strict=True)]
            control.observe(Step(outcomes, drafting, seen, rows, host_seconds=host))
            for text, path in zip(texts, kept, strict=True):
                text.tokens += range(1 + len(path))
        return total

    def draft(self, limit: int) -> Draft:
        probs = None if self.sure is None else [self.sure ** (i + 1) for i in range(limit)]
        return Draft.tree([1] * limit, range(-1, limit - 1), probs)


def steady(rate: float) -> Callable[[int], float]:
    return lambda _: rate


def plain(machine: Machine, tokens: int, sessions: int = 1) -> float:
    return tokens * (1 + machine.slope * (sessions - 1))


@pytest.mark.parametrize(("drafting", "slope"), [(0.0, 0.04), (0.0, 0.01), (0.5, 0.02)])
def test_a_drafter_that_always_loses_costs_three_percent_at_most(drafting: float, slope: float) -> None:
    machine = Machine({"bad": steady(0.0)}, {"bad": drafting}, slope)
    assert machine.run(Goodput(["bad"], 32), 2000) < 1.03 * plain(machine, 2000)


def test_trying_again_costs_many_texts_little() -> None:
    """A further position costs .8 of what one of 16 texts gets in the time, and each of them would try again."""
    machine, control = Machine({"bad": steady(0.0)}, {"bad": 0.0}, 0.2), Goodput(["bad"], 15)
    seconds = sum(machine.run(control, 60, sessions=16, room=15) for _ in range(4))
    assert seconds < 1.03 * 4 * plain(machine, 60, 16)


def test_what_taking_a_draft_costs_counts() -> None:
    machine = Machine({"some": steady(0.2)}, {"some": 0.0}, 0.02, taking=0.25)  # .2 tokens for .27 of a pass
    assert machine.run(Goodput(["some"], 32), 2000) < 1.03 * plain(machine, 2000)


@pytest.mark.parametrize(("drafting", "slope"), [(0.0, 0.04), (0.0, 0.005), (0.1, 0.02)])
def test_a_good_drafter_gets_nine_tenths_of_the_best_fixed_limit(drafting: float, slope: float) -> None:
    def seconds(control: Any, room: int) -> float:
        return Machine({"good": steady(0.9)}, {"good": drafting}, slope).run(control, 2000, room=room)

    best = min(seconds(Fixed("good"), limit) for limit in (1, 2, 4, 8, 12, 16, 24, 32))
    assert seconds(Goodput(["good"], 32), 32) < best / 0.9


@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_a_draft_that_costs_the_same_at_any_length_is_not_kept_short(rate: float) -> None:
    """A head's: nearly all of its seconds are its start's, and it says how sure it is of each node."""

    def seconds(control: Any, room: int) -> float:
        machine = Machine({"head": steady(rate)}, {"head": 0.005}, 0.015, start=0.1, sure=rate)
        return machine.run(control, 1000, room=room)

    best = min(seconds(Fixed("head"), limit) for limit in (1, 2, 4, 8, 15))
    assert seconds(Goodput(["head"], 15), 15) < best / 0.9


def test_a_kept_node_that_none_continues_says_nothing_of_going_on() -> None:
    """Siblings: the second is not what follows the first."""
    siblings, chain = Acceptance(), Acceptance()
    for _ in range(20):
        siblings.observe([0], [-1, -1], None)
        chain.observe([0], [-1, 0], None)
    assert siblings.rate > 0.9
    assert 0.4 < chain.rate < 0.6


def test_probabilities_are_calibrated_by_what_was_kept() -> None:
    """A drafter that says 0.8 and is right in every second case is taken to say 0.4 to 0.5, on other texts too."""
    pool = Acceptance()
    text = Acceptance(pool)
    for turn in range(60):
        for acceptance in (pool, text):
            acceptance.observe([0] if turn % 2 else [], [-1], [0.8])
    assert 0.4 < text.probabilities([0.8])[0] < 0.6
    assert 0.4 < Acceptance(pool).probabilities([0.8])[0] < 0.7


@pytest.mark.parametrize("drafting", [0.0, 0.3])
def test_a_change_in_the_text_is_followed_within_two_hundred_tokens(drafting: float) -> None:
    """Good, bad, good again, for 1,000 tokens each: at most what 200 tokens of the wrong bet would cost is lost."""
    flips = Machine({"some": lambda done: 0.0 if 1000 <= done < 2000 else 0.9}, {"some": drafting}, 0.03)
    good = Machine({"some": steady(0.9)}, {"some": drafting}, 0.03)
    whole = flips.run(Goodput(["some"], 32), 3000)
    best = good.run(Goodput(["some"], 32), 2000)
    assert whole < best + 1000 + 2 * 200


def test_the_best_of_three_drafters_is_used() -> None:
    rates = {"bad": steady(0.2), "dear": steady(0.9), "good": steady(0.8)}
    costs = {"bad": 0.0, "dear": 0.6, "good": 0.0}
    alone = Machine({"good": rates["good"]}, costs).run(Goodput(["good"], 32), 2000)
    assert Machine(rates, costs).run(Goodput(list(rates), 32), 2000) < 1.06 * alone


def test_a_hundred_tokens_bet_well() -> None:
    machine = Machine({"good": steady(0.9)}, {"good": 0.0}, 0.02)
    assert machine.run(Goodput(["good"], 32), 100) < 0.4 * plain(machine, 100)
    machine = Machine({"bad": steady(0.0)}, {"bad": 0.0}, 0.02)
    assert machine.run(Goodput(["bad"], 32), 100) < 1.03 * plain(machine, 100)


def test_a_batch_whose_rows_are_dear_bets_less() -> None:
    """The batch-size law: eight sessions' rows fill the machine."""

    def limit(sessions: int) -> float:
        machine, control = Machine({"fair": steady(0.6)}, {"fair": 0.0}, 0.12, noise=0.0), Goodput(["fair"], 32)
        machine.run(control, 400, sessions)
        texts = [Text() for _ in range(sessions)]
        return sum(bet.limit for bet in control.bets(texts, [32] * sessions)) / sessions

    assert limit(8) < limit(1)


def test_a_room_is_never_exceeded_and_no_drafter_is_no_bet() -> None:
    control = Goodput(["some"], 32)
    machine = Machine({"some": steady(0.95)}, {"some": 0.0}, 0.001)
    machine.run(control, 500, room=3)
    for room in (0, 1, 2, 5):
        assert control.bets([Text()], [room])[0].limit <= room
    assert Fixed("some").bets([Text()], [8]) == [Bet("some", 8)]


def test_what_was_not_tried_is_priced_in_the_seconds_that_passes_take() -> None:
    """Before the first pass seconds are unknown; a second drafter must not keep a price from then."""
    control, text = Goodput(["one", "two"], 8), Text()
    for _ in range(3):
        bets = control.bets([text], [8])
        draft = Draft.chain([1] * bets[0].limit)
        outcome = Outcome(text, bets[0], draft, [], Verdict((), 0))
        drafting = {bets[0].drafter: 0.001} if bets[0].limit else {}
        control.observe(Step([outcome], drafting, 0.01, 1 + len(draft)))
    assert control._cost("two").seconds(4) < 0.01


def test_a_run_begins_at_rest_where_nothing_paid_the_last_time() -> None:
    """Nightjar's price of being wrong: a second run of a drafter that never pays loses less than the first."""

    def machine() -> Machine:
        return Machine({"bad": steady(0.0), "good": steady(0.9)}, {"bad": 0.3, "good": 0.0}, 0.04)

    first = Goodput(["bad"], 32)
    lost = machine().run(first, 300) - plain(machine(), 300)
    second = Goodput(["bad"], 32, first.report())
    text = Text()
    assert [second.bets([text], [32])[0].limit for _ in range(6)] == [0] * 6
    again = machine().run(Goodput(["bad"], 32, first.report()), 300) - plain(machine(), 300)
    assert again < lost
    good = Goodput(["good"], 32, first.report())  # of another drafter nothing was learned
    machine().run(good, 200)
    assert good.report()["pauses"].keys() == {"bad", "good"}
    assert Goodput(["good"], 32, good.report()).bets([Text()], [32])[0].limit > 0


def test_a_drafter_that_pays_again_is_found_by_the_next_run() -> None:
    bad = Goodput(["some"], 32)
    Machine({"some": steady(0.0)}, {"some": 0.0}, 0.03).run(bad, 500)
    seconds = [
        Machine({"some": steady(0.9)}, {"some": 0.0}, 0.03).run(Goodput(["some"], 32, learned), 300)
        for learned in (None, bad.report())
    ]
    assert seconds[1] < seconds[0] + 40


@pytest.mark.parametrize("stored", [None, [], "x", {"some": 0}, {"some": 1e9}, {"some": "2"}, {"some": True}, {3: 4}])
def test_pauses_from_a_file_are_checked(stored: Any) -> None:
    control = Goodput(["some"], 32, {"pauses": stored})
    assert control.bets([Text()], [32])[0].limit > 0


def by_fours(rows: float) -> float:
    """Rows as the kernels with AVX2 take them: four together, and what is over at a price of its own."""
    return max(1.0, 1.6 * (rows // 4) + (0, 0.6, 0.95, 1.6)[int(rows) % 4])


@pytest.mark.parametrize("sessions", [2, 4, 8, 16])
@pytest.mark.parametrize(("rate", "sure"), [(0.0, 0.5), (0.5, 0.8), (0.95, 0.95)])
def test_where_rows_are_dear_many_texts_lose_two_percent_at_most(sessions: int, rate: float, sure: float) -> None:
    control = Goodput(["some"], 15)
    for rows in (1, 2, 4, 8, 16):
        control.calibrate(rows, by_fours(rows))
    machine = Machine({"some": steady(rate)}, {"some": 0.0}, passes=by_fours, sure=sure)
    seconds, written = 0.0, 0
    for _ in range(3):
        texts = [Text() for _ in range(sessions)]
        seconds += machine.run(control, 60, room=15, texts=texts)
        written += sum(len(text.tokens) - 100 for text in texts)
    assert seconds < 1.02 * written * by_fours(sessions) / sessions


@pytest.mark.parametrize(("rate", "sure"), [(0.3, 0.6), (0.5, 0.8), (0.8, 0.8)])
def test_a_text_alone_gets_nine_tenths_where_a_third_row_is_dear(rate: float, sure: float) -> None:
    def seconds(control: Any, room: int) -> float:
        return Machine({"some": steady(rate)}, {"some": 0.0}, passes=by_fours, sure=sure).run(control, 600, room=room)

    control = Goodput(["some"], 15)
    for rows in (1, 2, 4, 8, 16):
        control.calibrate(rows, by_fours(rows))
    assert seconds(control, 15) < min(seconds(Fixed("some"), limit) for limit in (1, 2, 3, 7, 15)) / 0.9


def test_what_was_measured_undisturbed_stays() -> None:
    """A pass of 16 rows that takes six times as long isn't forgotten while passes of one and two are seen."""
    curve = Curve()
    for rows in (1, 2, 4, 8, 16):
        curve.measure(rows, by_fours(rows))
    for _ in range(500):
        for rows in (1, 2, 1):
            curve.observe(rows, by_fours(rows))
    assert [curve.seconds(rows) for rows in (1, 2, 4, 8, 12, 16)] == pytest.approx([1, 1, 1.6, 3.2, 4.8, 6.4])
    assert curve.seconds(32) == pytest.approx(12.16)  # along the line from one row to 16


def test_a_number_of_rows_has_a_cost_of_its_own() -> None:
    """The ninth row begins another four; an outlier of ten times moves what is known by little."""
    curve = Curve()
    for rows in (1, 2, 4, 8, 16):
        curve.measure(rows, by_fours(rows))
    for turn in range(40):
        for rows in (8, 9, 12):
            curve.observe(rows, by_fours(rows) * (10 if turn == 20 and rows == 9 else 1))
    assert [curve.seconds(rows) for rows in (8, 9, 12)] == pytest.approx([3.2, 3.8, 4.8], rel=0.03)
    half = [0.5 * by_fours(rows) for rows in (8, 9, 12, 16)]
    for _ in range(60):  # another process has ended
        curve.observe(8, half[0])
    assert [curve.seconds(rows) for rows in (8, 9, 12, 16)] == pytest.approx(half, rel=0.2)


def test_a_curve_from_a_file_is_checked() -> None:
    curve = Curve()
    for rows, seconds in ((1, 0.01), (8, 0.02), (100, 0.3)):
        curve.observe(rows, seconds)
    stored = json.loads(json.dumps(curve.report()))
    assert [Curve.of(stored).seconds(rows) for rows in (1, 8, 50, 200)] == pytest.approx(
        [curve.seconds(rows) for rows in (1, 8, 50, 200)], rel=1e-3
    )
    for wrong in (None, [], "x", [1.0] * 11, [[1, "a"]], [[1, -1.0]], [[0, 1.0]], [[2, 1.0]], [[1, float("nan")]],
                  [[1, 1e99]], [[True, 1.0]], [[1.5, 1.0]], [[1, 1.0]] * 1000):  # fmt: skip
        assert Curve.of(wrong).report() == []
