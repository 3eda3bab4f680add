"""`--control entropy`: when it drafts, what its entropies are, and how its bound is fitted to a model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import engine, prompts, tiny

from longspec.bench.gate import Seen, Watched, bound, calibrate
from longspec.control import make
from longspec.control.policy import Bet, Entropy, Outcome, Step
from longspec.engine.forward import Input, logits_of
from longspec.machine.tuned import Fit, keep_fit, read_fit
from longspec.model.load import Model
from longspec.types import Draft, Verdict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"), end_tokens=())


def test_nothing_is_drafted_behind_an_unsure_token(model: Model) -> None:
    one, other = (engine(model).open(prompts(1)[0], raw=True, key=key) for key in "ab")
    control = Entropy("some", 1.5)
    sure = Bet("some", 8)
    assert control.bets([one, other], [8, 3]) == [sure, Bet("some", 3)]  # nothing is known of either

    def saw(session: Any, entropy: float | None) -> None:
        outcome = Outcome(session, sure, Draft.chain([1]), [], Verdict((), 0, entropy=entropy))
        control.observe(Step([outcome], {}, 0.01, 2))

    saw(one, 1.51)
    assert control.bets([one, other], [8, 8]) == [Bet("", 0, "unsure"), sure]
    saw(one, None)  # a verdict without one says nothing
    assert control.bets([one], [8]) == [Bet("", 0, "unsure")]
    saw(one, 1.5)
    assert control.bets([one], [8]) == [sure]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_the_text_is_that_of_plain_decoding_whatever_the_bound(model: Model, options: dict[str, Any]) -> None:
    (prompt,) = prompts(1)
    given: Any = {"raw": True, "max_new_tokens": 40, **options}
    plain = engine(model).generate(prompt, **given)
    drafted = []
    for most in (-1.0, 2.5, math.inf):
        answer = engine(model, "ngram", control=Entropy("ngram", most)).generate(prompt, **given)
        assert answer.tokens == plain.tokens
        drafted.append(answer.speculation["drafted"])
    assert drafted == sorted(drafted)
    assert drafted[0] <= 15 < drafted[2]  # before the first step nothing is known, and it may draft
    assert answer.speculation["bets"].keys() <= {"ngram", "none: nothing found", "none: at the end"}


def test_an_entropy_is_that_of_the_distribution_of_the_last_token(model: Model) -> None:
    """After each step, by a pass over all of the text."""
    control = Watched("ngram")
    made = engine(model, "ngram", control=control)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=30)
    for _ in made.prefill(session):
        pass
    for _ in range(6):
        made.step([session])
        fresh = engine(model).open(prompts(1)[0], raw=True)
        with torch.inference_mode():
            logits = logits_of([Input.of(fresh, session.tokens[:-1], Draft.chain(()))], model.decoder)[-1].float()
        falling = logits.log_softmax(-1)
        want = -(falling.exp() * falling).sum().item()
        assert control.entropy_of(session) == pytest.approx(want, abs=1e-4)
    assert len(control.seen) == 5


def test_a_bound_keeps_what_is_asked_and_is_the_lowest() -> None:
    chance = random.Random(4)
    seen = []
    for _ in range(2000):  # the less sure, the less is kept
        entropy = chance.expovariate(0.8)
        seen.append(Seen(entropy, 15, sum(chance.random() < math.exp(-1.2 * entropy) for _ in range(3))))
    tokens = sum(1 + step.kept for step in seen)

    def lost(most: float) -> float:
        return sum(step.kept for step in seen if step.entropy > most) / tokens

    for share in (0.01, 0.05, 0.2):
        found = bound(seen, share)
        assert lost(found) <= share
        assert lost(found - 0.05) > share
    found = bound(seen)
    assert sum(step.drafted for step in seen if step.entropy > found) >= 0.3 * sum(step.drafted for step in seen)
    assert bound([]) == bound([Seen(3.0, 5, 0)]) == Entropy.MOST
    assert bound([Seen(1.0, 5, 3)]) == 1.0


def test_a_bound_is_fitted_to_a_model(model: Model) -> None:
    stages = []
    gate = calibrate(model, 0.0, lambda stage, done, total: stages.append(stage))
    assert 0 <= gate.entropy <= math.log(model.decoder.config.vocabulary) + 1e-3
    assert gate.saved <= 1
    assert gate.lost <= 1
    assert set(stages) == {"fitting the entropy bound"}


def test_a_bound_is_kept_and_taken(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    fit = Fit("fp32", 1, 1.25)
    keep_fit(path, fit, {})
    assert read_fit(path) == fit
    stored = json.loads(path.read_text())
    for wrong in ("much", -1, 1e9, None, [1]):
        path.write_text(json.dumps({**stored, "entropy": wrong}))
        assert read_fit(path) == Fit("fp32", 1)
    del stored["entropy"]  # of a release that fitted none
    path.write_text(json.dumps(stored))
    assert read_fit(path) == Fit("fp32", 1)
    for known, most in ((fit, 1.25), (Fit("fp32", 1), Entropy.MOST), (None, Entropy.MOST)):
        tuned = Model(model.name, "fp32", model.decoder, model.vocabulary, (), {}, {}, fit=known)
        control = engine(tuned, "ngram", control="entropy").speculator.control
        assert isinstance(control, Entropy)
        assert control.most == most
    assert isinstance(make("entropy", ["ngram"], 15), Entropy)
