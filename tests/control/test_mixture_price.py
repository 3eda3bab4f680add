"""Passes of a mixture are priced by the experts that their rows go through: what routers chose is what control expects,
and the draft length that it settles on is as good as the best fixed one, whatever is accepted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import engine, prompts, tiny

from longspec.control.goodput import Goodput
from longspec.control.latency import Curve
from longspec.control.policy import Fixed, Step
from longspec.model.load import Model
from longspec.model.mixtures import Mixture
from longspec.model.reads import Growth, Reads
from longspec.model.routing import Recent, unions
from longspec.types import Draft, Drafter, Writing

SIZES: dict[str, Any] = {
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "mlp_only_layers": [],
}
SAMPLED: dict[str, Any] = {
    "temperature": 1.2,
    "seed": 4,
}  # a random model's greedy text is one token, whose rows all choose alike
TOKENS = 600
PASS = 0.05  # seconds of a pass of one row


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("mixture"), "qwen3_moe", end_tokens=(), max_position_embeddings=1024, **SIZES)


# --- what routers chose


def test_the_union_of_the_last_rows_is_counted() -> None:
    """By brute force, over passes of several sizes."""
    chance, layers = random.Random(3), [Recent(12), Recent(12)]
    rows: list[list[list[int]]] = [[], []]
    for size in (1, 5, 1, 1, 17, 2):
        for layer, own in zip(layers, rows, strict=True):
            passed = [chance.sample(range(12), 3) for _ in range(size)]
            layer.add(torch.tensor(passed))
            own += passed
            assert layer.union == len({expert for row in passed for expert in row})
        counted = [np.mean([len({e for row in own[len(own) - n :] for e in row}) for own in rows]) for n in range(10)]
        known = min(10, len(rows[0]) + 1)
        assert unions(layers, 9)[:known].tolist() == pytest.approx(counted[:known])


def test_a_pass_has_read_what_its_rows_chose(model: Model) -> None:
    """Over the whole of an answer: what the step says, against what the routers say when they are asked."""
    steps: list[Step] = []

    class Noting(Fixed):
        def observe(self, step: Step) -> None:
            steps.append(step)

    made = engine(model, "ngram", control=Noting("ngram"))
    made.generate(prompts(1)[0], raw=True, max_new_tokens=30, **SAMPLED)
    layers, reads = model.decoder.layers, Reads.of(model.decoder.touched, model.decoder.config.mixture)
    assert reads.by_rows(1) == pytest.approx(model.decoder.touched(1), abs=1)
    assert reads.by_rows(7) == pytest.approx(model.decoder.touched(7), abs=1)
    last = sum(layer.mlp.recent.union for layer in layers) / len(layers)
    assert steps[-1].growth == pytest.approx(reads.by_union(last) / reads.by_union(2))
    grown = [step.growth for step in steps if step.growth is not None]
    assert len(grown) == len(steps)
    assert min(grown) >= 1
    assert max(grown) > 1.5
    assert all(step.growth == 1 for step in steps if step.rows == 1)


def test_rows_that_choose_alike_are_expected_to_be_cheap(model: Model) -> None:
    growth, layers = Growth(model.decoder), [layer.mlp.recent for layer in model.decoder.layers]
    assert growth.union(8) == pytest.approx(Mixture(32, 2, 32, (True,) * 2).union(8))  # nothing was seen
    for each in layers:
        each.add(torch.tensor([[1, 2]] * 64))
    growth.observe()
    assert [growth.union(rows) for rows in (1, 2.5, 64)] == [2, 2, 2]
    assert growth(64) == 1
    assert growth.union(80) > 8  # of more rows than were looked at the others choose at random
    for each in layers:
        each.add(torch.tensor([[i % 32, (i + 1) % 32] for i in range(64)]))
    growth.observe()
    assert growth.union(8) == pytest.approx(9)
    assert growth(8) > growth(4) > growth(1) == 1


def test_a_dense_model_is_priced_as_it_was(tmp_path: Path) -> None:
    growth = Growth(tiny(tmp_path).decoder)
    assert [growth(rows) for rows in (1, 3.5, 500)] == [1, 1, 1]
    assert growth.observe() == 1
    plain, priced = Curve(), Curve()
    priced.growth = growth
    for rows, seconds in ((1, 0.01), (16, 0.02), (1, 0.011), (5, 0.012)):
        plain.observe(rows, seconds)
        priced.observe(rows, seconds, 1.0)
    assert plain.report() == priced.report()


def test_what_a_curve_has_learned_holds_where_rows_choose_otherwise() -> None:
    curve = Curve()
    curve.growth = lambda rows: 1 + 0.5 * (rows - 1)
    for _ in range(20):
        for rows in (1, 2, 4):
            curve.observe(rows, 0.1 * curve.growth(rows), curve.growth(rows))
    assert curve.seconds(4) == pytest.approx(0.25, rel=0.02)
    curve.growth = lambda rows: 1.0
    assert curve.seconds(4) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("arithmetic", [0.002, 0.02, 0.1])
@pytest.mark.parametrize("mixture", [None, Mixture(128, 8, 32, (True,) * 2), Mixture(32, 4, 32, (True,) * 2)])
def test_beyond_what_was_measured_bytes_flatten_and_rows_go_on(mixture: Mixture | None, arithmetic: float) -> None:
    """Seconds are bytes and arithmetic: measured up to 32 rows, passes of more are foretold."""
    reads = Reads(100, 0.0 if mixture is None else 40.0, mixture)

    def growth(rows: float) -> float:
        return reads.by_rows(rows) / reads.by_rows(1)

    def seconds(rows: int) -> float:
        return 0.05 * (growth(rows) + arithmetic * rows)

    curve = Curve()
    curve.growth = growth
    for _ in range(30):
        for rows in (1, 2, 4, 8, 16, 32):
            curve.observe(rows, seconds(rows), growth(rows))
    for _ in range(100):  # steps without drafts take nothing of that back
        curve.observe(1, seconds(1), 1.0)
    for rows in (48, 64, 100, 128, 256):
        assert curve.seconds(rows) == pytest.approx(seconds(rows), rel=0.1), rows


# --- what control makes of it


class Foretold(Drafter):
    """Knows the answer, and is wrong at some positions, whoever asks: each is right with the same probability."""

    def __init__(self, text: Sequence[int], rate: float) -> None:
        chance = random.Random(7)
        self.text, self.wrong = list(text), [chance.random() >= rate for _ in text]

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        drafts = []
        for session, limit in zip(sessions, limits, strict=True):
            places = range(len(session.tokens), len(self.text))[:limit]
            tokens = [3 + (self.text[i] + 40) % 90 if self.wrong[i] else self.text[i] for i in places]
            drafts.append(Draft.chain(tokens))
        return drafts


class Clock:
    """What a control is told in place of seconds: those of a mixture that memory bounds, by what a pass has read."""

    def __init__(self, control: Any) -> None:
        self.seconds, self._observe = 0.0, control.observe
        control.observe = self

    def __call__(self, step: Step) -> None:
        assert step.growth is not None
        seconds = PASS * step.growth * (1 + 0.01 * (step.rows - 1))
        self.seconds += seconds
        drafting = dict.fromkeys(step.draft_seconds, PASS / 100)
        self._observe(replace(step, pass_seconds=seconds, draft_seconds=drafting))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.9])
def test_the_length_is_as_good_as_the_best_fixed_one(model: Model, rate: float) -> None:
    (prompt,) = prompts(1)
    given: Any = {"raw": True, "max_new_tokens": TOKENS, **SAMPLED}
    plain = engine(model).open(prompt, **given)
    text = list(plain.tokens) + list(engine(model).generate(prompt, **given).tokens)

    def seconds(control: Any, most: int, answers: int = 1) -> list[float]:
        """Of each answer."""
        clock, took = Clock(control), []
        made = engine(model, Foretold(text, rate), control=control, draft_tokens=most)
        for _ in range(answers):
            before, answer = clock.seconds, made.generate(prompt, **given)
            assert [*plain.tokens, *answer.tokens] == text
            took.append(clock.seconds - before)
        return took

    lengths = {0.0: (1,), 0.3: (1,), 0.6: (2, 3), 0.9: (8, 12, 16)}[rate]
    fixed = {0: PASS * TOKENS} | {length: seconds(Fixed("foretold"), length)[0] for length in lengths}
    ours = seconds(Goodput(["foretold"], 16), 16, answers=2)  # it begins without knowing its drafter
    assert ours[1] < 1.05 * min(fixed.values()), (ours, fixed)
    assert ours[0] < 1.12 * min(fixed.values()), (ours, fixed)
