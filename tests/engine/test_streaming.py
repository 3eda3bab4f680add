"""Weights on disk: the text of weights in memory with every drafter, rows that leave on the way, and the plan."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import oracle, write
from support.commands import inside, share_kernels, write_tiny
from support.engines import RandomTrees, engine, every_drafter, finish, of_folder, prompts, tiny
from support.streamed import streamed

from longspec.engine import pruning
from longspec.engine.engine import Engine
from longspec.errors import BudgetError, UsageError
from longspec.memory.plan import alone, choices, make_plan, request_of
from longspec.model.load import Model, open_model

ENDS = (2,)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share_kernels(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def texts_of(made: Engine, options: dict[str, Any], tokens: int = 40) -> dict[str, list[int]]:
    sessions = [
        made.open(text, raw=True, max_new_tokens=tokens, key=str(i), **options) for i, text in enumerate(prompts(3, 90))
    ]
    return dict(zip(map(str, range(3)), finish(made, sessions), strict=True))


def on_disk(folder: Path, kept: int = 0) -> Model:
    return replace(of_folder(folder, ENDS), decoder=streamed(folder, kept=kept))


SAMPLED = {"temperature": 0.9, "seed": 3}
QUICK = ("exit", "model", "recycle", "skip+ngram")  # the others are for the full matrix


@pytest.mark.parametrize(
    ("drafter", "options"),
    [
        pytest.param(name, options, id=f"{name}-{'sampled' if options else 'greedy'}",
                     marks=[] if name in QUICK and options else pytest.mark.full)
        for name in every_drafter({}, "llama") for options in (SAMPLED, {})
    ],
)  # fmt: skip
def test_every_drafter_writes_the_same(drafter: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", end_tokens=ENDS, num_hidden_layers=5)
    want = texts_of(engine(model), options)
    made = engine(on_disk(tmp_path / "model", kept=1), every_drafter(want, "llama")[drafter]())
    assert texts_of(made, options) == want


@pytest.mark.parametrize(
    ("family", "cache", "options"),
    [
        ("llama", "dense", SAMPLED),
        ("qwen3_moe", "int8", {}),
        pytest.param("llama", "int8", {}, marks=pytest.mark.full),
        pytest.param("qwen3_moe", "dense", SAMPLED, marks=pytest.mark.full),
    ],
)
def test_rows_that_leave_on_the_way_change_nothing(
    family: str, cache: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_SEEN": 20, "_LEAST": 0.4, "_WHOLE": 1000}.items():
        monkeypatch.setattr(pruning, name, value)
    model = tiny(tmp_path / "model", family, end_tokens=ENDS, num_hidden_layers=5)
    want = texts_of(engine(model, cache=cache), options, 80)
    made = engine(on_disk(tmp_path / "model"), RandomTrees(want), cache=cache)
    assert (made.pruner is None) == (family == "llama")  # of its own accord, a mixture's rows alone
    made.pruner = made.pruner or pruning.Pruner(made.model.decoder)
    assert texts_of(made, options, 80) == want
    assert made.pruner.rows > 30


def test_what_is_learned_of_rows(tmp_path: Path) -> None:
    """A feature that tells kept nodes from others is found, and those without a chance leave."""
    generator = torch.Generator().manual_seed(4)
    pruner = pruning.Pruner(tiny(tmp_path / "model").decoder)
    for _ in range(600):
        x = torch.cat((torch.ones(1), torch.randn(4, generator=generator))).double()
        pruner._learn(x, kept=bool(x[1] > 0))
    chance = torch.sigmoid(torch.tensor([[1.0, 2, 0, 0, 0], [1, -2, 0, 0, 0]], dtype=torch.float64) @ pruner._weights)
    assert chance[0] > 0.95
    assert chance[1] < 0.05


# --- the plan


def test_weights_that_dont_fit_stay_on_disk() -> None:
    opened = open_model("smollm2")
    request = request_of(opened, 500, drafter="none")
    layers = request.footprint.layers
    if not layers:
        pytest.skip("these weights are converted first")
    assert len(layers) == 30
    whole = alone(replace(request, weights="memory"))
    needs = [one.need.total for one in choices(replace(request, weights="disk"))]
    assert min(needs) < whole
    budget = min(needs) + 2 * max(layers)
    plan = make_plan(opened, budget, tokens=500, drafter="none")
    assert plan.choice.kept is not None
    assert plan.choice.need.total <= budget
    assert plan.choice.streamed == sum(layers) - layers[0] * plan.choice.kept
    assert "of weights read from disk for each pass" in str(plan)
    assert make_plan(opened, 8 * whole, tokens=500, drafter="none").choice.kept is None
    assert make_plan(opened, 8 * whole, tokens=500, drafter="none", weights="disk").choice.kept == 30
    with pytest.raises(BudgetError, match="process and weights alone need"):
        make_plan(opened, budget, tokens=500, drafter="none", weights="memory")
    with pytest.raises(BudgetError, match="process and weights alone need"):
        make_plan(opened, min(needs) - 30_000_000, tokens=500, drafter="none")


def test_where_weights_can_be() -> None:
    with pytest.raises(UsageError, match="can't be 'tape'; use one of: auto, memory, disk"):
        Engine.load(weights="tape")


# --- the command


def test_a_file_that_shrinks_ends_the_text_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read, left = write_tiny(tmp_path / "model"), os.preadv, [60]
    write(oracle("llama", max_position_embeddings=2000, bos_token_id=1, eos_token_id=None, num_hidden_layers=5), folder)

    def fails(*args: Any) -> int:
        left[0] -= 1
        return read(*args) if left[0] > 0 else 0

    monkeypatch.setattr(os, "preadv", fails)
    result = inside(["run", "-m", str(folder), "--weights", "disk", "--raw", "--drafter", "none", "abc"], tmp_path)
    assert result.code == 3
    assert result.out
    assert "became shorter while the model ran" in result.err
    assert result.err.count("\n") == 1
