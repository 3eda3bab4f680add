"""`--control entropy`: how much it drafts, what its entropies are, and how its limits are fitted to a model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import engine, prompts, tiny

from longspec.bench.gate import EVERYTHING, Seen, Watched, calibrate, fitted
from longspec.control import make
from longspec.control.policy import Bet, Entropy, Outcome, Step
from longspec.engine.forward import Input, logits_of
from longspec.machine.tuned import Fit, keep_fit, read_fit
from longspec.model.load import Model
from longspec.types import Draft, Verdict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"), end_tokens=())


def test_surer_tokens_alone_are_drafted_behind_an_unsure_one(model: Model) -> None:
    one, other = (engine(model).open(prompts(1)[0], raw=True, key=key) for key in "ab")
    control = Entropy("some", ((1.0, 0.1), (1.5, 0.4)))
    sure = Bet("some", 8)
    tree = Draft.tree([1, 2, 3, 4], [-1, 0, -1, 1], [0.5, 0.4, 0.2, 0.05])
    silent, atomic = Draft.chain([1, 2]), Draft.tree([1], [-1], [0.01], whole=True)

    def lengths(*drafts: Draft) -> list[int]:
        return [len(control.trim([one], [sure], [draft])[0]) for draft in drafts]

    def saw(session: Any, entropy: float | None) -> None:
        outcome = Outcome(session, sure, Draft.chain([1]), [], Verdict((), 0, entropy=entropy))
        control.observe(Step([outcome], {}, 0.01, 2))

    assert control.bets([one, other], [8, 3]) == [sure, Bet("some", 3)]  # nothing is known of either
    assert lengths(tree, silent, atomic) == [4, 2, 1]
    saw(one, 1.51)
    assert control.bets([one, other], [8, 8]) == [Bet("", 0, "unsure"), sure]
    saw(one, None)  # a verdict without one says nothing
    assert control.bets([one], [8]) == [Bet("", 0, "unsure")]
    saw(one, 1.5)
    assert control.bets([one], [8]) == [sure]
    assert lengths(tree, silent, atomic) == [2, 2, 1]  # who gives no probabilities is not cut
    saw(one, 1.0)
    assert lengths(tree, silent, atomic) == [3, 2, 1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_the_text_is_that_of_plain_decoding_whatever_the_limits(model: Model, options: dict[str, Any]) -> None:
    (prompt,) = prompts(1)
    given: Any = {"raw": True, "max_new_tokens": 40, **options}
    plain = engine(model).generate(prompt, **given)
    drafted = []
    for limits in ((), ((2.5, 0.4),), ((2.5, 0.0),), EVERYTHING):
        answer = engine(model, "ngram", control=Entropy("ngram", limits)).generate(prompt, **given)
        assert answer.tokens == plain.tokens
        drafted.append(answer.speculation["drafted"])
    assert drafted == sorted(drafted)
    assert drafted[0] <= 15 < drafted[3]  # before the first step nothing is known, and it may draft
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


def test_limits_keep_what_is_asked_and_save_more_than_a_gate_or_a_floor() -> None:
    """Against every gate of all or nothing, and every floor for all steps, that lose no more."""
    chance, seen = random.Random(4), []
    for _ in range(3000):  # the less sure the target, the less is kept of what the drafter gives
        entropy = chance.expovariate(0.8)
        probs = sorted((chance.random() ** 3 for _ in range(15)), reverse=True)
        seen.append(Seen(entropy, probs, [i for i in range(15) if chance.random() < probs[i] * math.exp(-entropy / 2)]))
    tokens = len(seen) + sum(len(step.kept) for step in seen)

    def worth(floor_of: Any) -> tuple[float, int]:
        """Share of the tokens that is lost, and the rows."""
        kept = sum(step.probs[node] >= floor_of(step.entropy) for step in seen for node in step.kept)
        return 1 - (len(seen) + kept) / tokens, sum(p >= floor_of(step.entropy) for step in seen for p in step.probs)

    for share in (0.02, 0.05, 0.1):
        limits = fitted(seen, share)
        assert [nats for nats, _ in limits] == sorted(nats for nats, _ in limits)
        assert [floor for _, floor in limits] == sorted(floor for _, floor in limits)
        lost, rows = worth(lambda nats, limits=limits: next(floor for bound, floor in limits if nats <= bound))
        assert lost <= share
        gates = [worth(lambda nats, bound=bound: 0 if nats <= bound else 2) for bound in (i / 10 for i in range(80))]
        assert rows < min(own for own_lost, own in gates if own_lost <= share)
        floors = [worth(lambda nats, floor=floor: floor) for floor in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)]
        assert rows <= min(own for own_lost, own in floors if own_lost <= share)
    assert fitted([]) == fitted([Seen(3.0, [0.5] * 5, [])]) == Entropy.LIMITS
    assert fitted([Seen(1.0, [0.9, 0.8, 0.3, 0.1], [0, 1])]) == ((Entropy.MOST, 0.4),)


def test_limits_are_fitted_to_a_model(model: Model) -> None:
    stages = []
    gate = calibrate(model, 0.0, lambda stage, done, total: stages.append(stage))
    assert gate.limits[-1][0] == Entropy.MOST
    assert all(0 <= nats <= math.log(model.decoder.config.vocabulary) + 1e-3 for nats, _ in gate.limits[:-1])
    assert gate.saved <= 1
    assert gate.lost <= 1
    assert set(stages) == {"fitting the limits of entropy"}


def test_limits_are_kept_and_taken(model: Model, tmp_path: Path) -> None:
    path, limits = tmp_path / "fit.json", ((1.25, 0.02), (Entropy.MOST, 0.06))
    fit = Fit("fp32", 1, limits)
    keep_fit(path, fit, {})
    assert read_fit(path) == fit
    stored = json.loads(path.read_text())
    wrong: list[Any] = [
        "much",
        1.25,
        None,
        [],
        [1],
        [[1.0]],
        [[1.0, 2]],
        [[2.0, 0.1], [1.0, 0.2]],
        [[1.0, 0.2], [2.0, 0.1]],
    ]
    for entropy in [
        *wrong,
        [[-1.0, 0.1]],
        [[1e9, 0.1]],
        [[1.0, 1.5]],
        [[1.0, -0.1]],
        [[1.0, True]],
        [[float("nan"), 0.1]] * 2,
    ]:
        path.write_text(json.dumps({**stored, "entropy": entropy}))
        assert read_fit(path) == Fit("fp32", 1), entropy
    del stored["entropy"]  # of a release that fitted none
    path.write_text(json.dumps(stored))
    assert read_fit(path) == Fit("fp32", 1)
    for known, taken in ((fit, limits), (Fit("fp32", 1), Entropy.LIMITS), (None, Entropy.LIMITS)):
        tuned = Model(model.name, "fp32", model.decoder, model.vocabulary, (), {}, {}, fit=known)
        control = engine(tuned, "ngram", control="entropy").speculator.control
        assert isinstance(control, Entropy)
        assert control.limits == taken
    assert isinstance(make("entropy", ["ngram"], 15), Entropy)
