"""What drafters take is in the plan, before anything is loaded, and in the result, when it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import write_tiny
from support.engines import engine, prompts, tiny
from support.published import write as write_head

from longspec.drafters.spec import parse
from longspec.errors import BudgetError
from longspec.memory.plan import DRAFTS, Request, choice, plan, request_of
from longspec.model.load import Model, open_model
from longspec.model.weights.footprint import Footprint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"), end_tokens=())


def request_for(folder: Path, drafter: str, options: dict[str, Any] | None = None) -> Request:
    opened = open_model(str(folder), dtype="fp32", device="cpu")
    return request_of(opened, 400, drafter=drafter, options=options, texts=2)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "target", 500)


def test_a_draft_model_is_planned_and_reported(model: Model, target: Path, tmp_path: Path) -> None:
    """Its weights once, its dense cache for each text."""
    plain = choice(request_for(target, "ngram"), "dense", 64).need.drafter
    asked = request_for(target, "model+ngram", {"draft": str(target)})
    drafter = choice(asked, "dense", 64).need.drafter
    weights = asked.footprint.resident
    rows = 2 * 400 * asked.shape.row_bytes
    assert drafter - plain == weights + rows
    made = engine(model, "model")
    assert made.speculator.nbytes == model.decoder.nbytes
    answer = made.generate(prompts(1)[0], raw=True, max_new_tokens=4)
    assert answer.memory["drafter_bytes"] == model.decoder.nbytes


def test_a_budget_that_the_draft_model_breaks_is_refused(target: Path) -> None:
    without, with_draft = (
        replace(request_for(target, name, options), process=256 << 20, weights="memory", texts=1)
        for name, options in (("ngram", None), ("model+ngram", {"draft": str(target)}))
    )
    needed = choice(replace(with_draft, draft_tokens=DRAFTS[-1]), "dense", 64).need.total
    plan(with_draft, needed, "dense")
    plan(without, needed - 1, "dense")
    with pytest.raises(BudgetError, match="drafter"):
        plan(with_draft, needed - 1, "dense")


@pytest.mark.parametrize("layout", ["authors", "speculators", "medusa"])
def test_published_heads_are_planned_and_reported(model: Model, tmp_path: Path, layout: str) -> None:
    folder = write_head(tmp_path / "head", layout, model)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    drafter = parse(str(folder)).make(model)
    assert 0.5 * stored < drafter.nbytes <= 2.5 * stored
    spec = parse(str(folder))
    config = model.decoder.config
    footprint = Footprint(1 << 20, 1 << 20, 1 << 20)
    asked = Request(config, "fp32", torch.device("cpu"), footprint, 300, 0, drafters=[spec])
    assert choice(asked, "dense", 64).need.drafter >= drafter.nbytes
