"""Drafters that rest give back what they hold where memory runs short, and the text is the same without them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import engine, finish, prompts, tiny

from longspec.cache import Dense
from longspec.control.goodput import Goodput
from longspec.control.policy import Control, Outcome, Step
from longspec.engine.engine import Engine
from longspec.engine.memory_guard import STEPS, Watch
from longspec.memory.plan import Plan, Request, choice
from longspec.model.load import Model
from longspec.model.weights.footprint import Footprint
from longspec.types import Draft, Verdict

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"), end_tokens=())


class Text:
    """As much of a session as a control sees."""


def lost(control: Goodput, text: Any, steps: int) -> Iterator[int]:
    """So many steps whose drafts bring nothing."""
    for _ in range(steps):
        (bet,) = control.bets([text], [8])
        draft = Draft.chain([1] * bet.limit)
        outcome = Outcome(text, bet, draft, [], Verdict((), 0))
        drafting = {bet.drafter: 0.05} if bet.limit else {}
        control.observe(Step([outcome], drafting, 0.1 * (1 + 0.1 * len(draft)), 1 + len(draft)))
        yield bet.limit


def test_a_drafter_rests_when_nothing_has_paid_for_long() -> None:
    control, text = Goodput(["bad"], 8), Text()
    assert control.resting() == []
    assert any(control.resting() for _ in lost(control, text, 400))
    assert control.resting() == ["bad"]
    other = Text()
    trials: Any = control._of(other)  # type: ignore[arg-type]  # a new text begins at rest
    assert control.resting() == ["bad"]
    trials["bad"].due = 0  # it pays there
    assert control.resting() == []
    del trials, other
    assert control.resting() == ["bad"]
    control.forget("bad")
    assert control.resting() == []
    assert not any(lost(control, text, 300))
    assert Control("bad").resting() == []


class Watched(Watch):
    """Sees less where nobody holds a draft model."""

    engine: Engine

    def used(self) -> int:
        return (295 if "model+ngram" in self.engine.speculator.drafters else 200) * MIB


@pytest.mark.parametrize("resting", [True, False])
def test_what_rests_is_let_go_of_before_the_cache_is_changed(
    model: Model, monkeypatch: pytest.MonkeyPatch, resting: bool
) -> None:
    monkeypatch.setattr("longspec.engine.memory_guard.peak_bytes", lambda: 0)
    (prompt,) = prompts(1)
    plain = engine(model).generate(prompt, raw=True, max_new_tokens=3 * STEPS, temperature=0)
    made = Engine(model, options={"draft": model}, control="goodput")
    asked = Request(model.decoder.config, "fp32", torch.device("cpu"), Footprint(MIB, MIB, MIB), 512, process=100 * MIB)
    made.plan = Plan(asked, 290 * MIB, choice(asked, "dense", 512))
    made.watch = watch = Watched(made.plan, moves=True)
    watch.engine, watch.give_back = made, made.speculator.give_back
    monkeypatch.setattr(made.speculator.control, "resting", lambda: ["model+ngram"] if resting else [])
    session = made.open(prompt, raw=True, max_new_tokens=3 * STEPS, temperature=0)
    if resting:
        finish(made, [session])
        assert tuple(session.answer) == plain.tokens
        assert [*made.speculator.drafters] == ["recycle+ngram"]
        assert type(session.cache) is Dense
        (note,) = session.notes
        assert re.search(r"model\+ngram drafts no more: nothing paid.*below 290 MiB", note)
        assert made.answer(session).memory["drafter_bytes"] == made.speculator.nbytes < model.decoder.nbytes
        again = made.generate(prompt, raw=True, max_new_tokens=9, temperature=0, drafter="recycle+ngram")
        assert again.tokens == plain.tokens[:9]
    else:
        assert made.speculator.give_back() is None
        assert [*made.speculator.drafters] == ["model+ngram", "recycle+ngram"]


def test_a_text_that_asked_for_it_goes_on_without(model: Model, tmp_path: Path) -> None:
    (prompt,) = prompts(1)
    made = Engine(model, options={"draft": model}, control="goodput")
    session = made.open(prompt, raw=True, max_new_tokens=12, temperature=0, drafter="model+ngram")
    for _ in made.prefill(session):
        pass
    made.step([session])
    made.speculator.control.resting = lambda: ["model+ngram"]  # type: ignore[method-assign]
    assert made.speculator.give_back() == "model+ngram"
    finish(made, [session])
    assert tuple(session.answer) == engine(model).generate(prompt, raw=True, max_new_tokens=12, temperature=0).tokens
