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


def test_less_is_drafted_behind_an_unsure_token(model: Model) -> None:
    one, other = (engine(model).open(prompts(1)[0], raw=True, key=key) for key in "ab")
    control = Entropy("some", ((1.0, 8), (1.5, 3)))
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
    assert control.bets([one], [8]) == [Bet("some", 3)]
    assert control.bets([one], [2]) == [Bet("some", 2)]
    saw(one, 1.0)
    assert control.bets([one], [8]) == [sure]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_the_text_is_that_of_plain_decoding_whatever_the_limits(model: Model, options: dict[str, Any]) -> None:
    (prompt,) = prompts(1)
    given: Any = {"raw": True, "max_new_tokens": 40, **options}
    plain = engine(model).generate(prompt, **given)
    drafted = []
    for limits in ((), ((2.5, 6),), ((2.5, 15),), EVERYTHING):
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


def test_limits_keep_what_is_asked_and_save_more_than_a_gate_or_a_length() -> None:
    """Against every gate of all or nothing, and every length for all steps, that lose no more."""
    chance, seen = random.Random(4), []
    for _ in range(3000):  # the less sure, the less is kept; later nodes are kept less
        entropy = chance.expovariate(0.8)
        rates = [math.exp(-0.25 * (1 + entropy) * (1 + node / 3)) for node in range(15)]
        seen.append(Seen(entropy, 15, [node for node in range(15) if chance.random() < rates[node] / 2]))
    tokens = len(seen) + sum(len(step.kept) for step in seen)

    def worth(allowed: Any) -> tuple[float, int]:
        """Share of the tokens that is lost, and the rows."""
        lengths = [allowed(step.entropy) for step in seen]
        kept = sum(sum(node < n for node in step.kept) for step, n in zip(seen, lengths, strict=True))
        return 1 - (len(seen) + kept) / tokens, sum(lengths)

    for share in (0.02, 0.05, 0.1):
        limits = fitted(seen, share)
        assert [nats for nats, _ in limits] == sorted(nats for nats, _ in limits)
        assert [most for _, most in limits] == sorted((most for _, most in limits), reverse=True)
        lost, rows = worth(lambda nats, limits=limits: next(most for bound, most in limits if nats <= bound))
        assert lost <= share
        gates = [worth(lambda nats, bound=bound: 15 if nats <= bound else 0) for bound in (i / 10 for i in range(80))]
        assert rows < min(own for own_lost, own in gates if own_lost <= share)
        lengths = [worth(lambda nats, most=most: most) for most in range(16)]
        assert rows <= min(own for own_lost, own in lengths if own_lost <= share)
    assert fitted([]) == fitted([Seen(3.0, 5, [])]) == Entropy.LIMITS
    assert fitted([Seen(1.0, 5, [0, 1, 2])]) == ((Entropy.MOST, 3),)


def test_limits_are_fitted_to_a_model(model: Model) -> None:
    stages = []
    gate = calibrate(model, 0.0, lambda stage, done, total: stages.append(stage))
    assert gate.limits[-1][0] == Entropy.MOST
    assert all(0 <= nats <= math.log(model.decoder.config.vocabulary) + 1e-3 for nats, _ in gate.limits[:-1])
    assert gate.saved <= 1
    assert gate.lost <= 1
    assert set(stages) == {"fitting the limits of entropy"}


def test_limits_are_kept_and_taken(model: Model, tmp_path: Path) -> None:
    path, limits = tmp_path / "fit.json", ((1.25, 12), (Entropy.MOST, 6))
    fit = Fit("fp32", 1, limits)
    keep_fit(path, fit, {})
    assert read_fit(path) == fit
    stored = json.loads(path.read_text())
    wrong: list[Any] = ["much", 1.25, None, [], [1], [[1.0]], [[1.0, 2.0]], [[2.0, 5], [1.0, 4]], [[1.0, 4], [2.0, 5]]]
    for entropy in [*wrong, [[-1.0, 4]], [[1e9, 4]], [[1.0, 65]], [[1.0, -1]], [[1.0, True]], [[float("nan"), 1]] * 2]:
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
