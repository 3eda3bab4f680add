"""A Clover-2 head's cell in C against the same head by torch's operators."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.engines import engine, prompts, vocabulary
from support.heads import shaken
from support.native import SIZES, coded

from longspec.drafters.common import clover_native as cell
from longspec.drafters.heads.clover import Head
from longspec.heads.clover2 import Clover2
from longspec.model.load import DTYPES, Model
from longspec.training.train import ready
from longspec.types import Draft

DRAFTED = torch.arange(0, 96, 3)
"""The draft vocabulary: 32 tokens."""


def model_of(folder: Path, dtype: str) -> Model:
    made = coded(folder) if dtype == "int8" else load(folder, DTYPES[dtype])
    return Model("tiny", dtype, made, vocabulary(made.config.vocabulary), (), {}, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(oracle("llama", **SIZES), tmp_path_factory.mktemp("cell"))


def paths(draft: Draft) -> dict[tuple[int, ...], float]:
    """Each node's path, with its chance."""
    found: dict[tuple[int, ...], float] = {}
    made: list[tuple[int, ...]] = []
    assert draft.probs is not None
    for token, parent, chance in zip(draft.tokens.tolist(), draft.parents.tolist(), draft.probs.tolist(), strict=True):
        made.append((*(made[parent] if parent >= 0 else ()), token))
        found[made[-1]] = chance
    return found


def head_of(model: Model, **options: Any) -> Head:
    """As it is loaded: in the target's dtype."""
    return Head(model, ready(model, shaken("clover2", model, depth=4, tokens=DRAFTED, **options)))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_it_drafts_as_torch_does(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.05)
    model = model_of(folder, dtype)
    head = head_of(model)
    if head._cell is None:
        pytest.skip(str(cell.missing(head.head.module, head.decoder)))
    made = engine(model, head, draft_tokens=8, control="fixed")
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=60)
    for _ in made.prefill(session):
        pass
    common = all_of_them = 0
    while session.finish_reason is None:
        ours = paths(head.propose([session], [8])[0])
        kept, head._cell = head._cell, None
        theirs = paths(head.propose([session], [8])[0])
        head._cell = kept
        assert len(ours) == len(theirs) <= 8
        assert all(0 < len(path) <= 4 for path in ours)
        both = ours.keys() & theirs.keys()
        assert all(abs(ours[path] - theirs[path]) < 0.05 for path in both)
        common, all_of_them = common + len(both), all_of_them + len(ours)
        made.step([session])
    assert common > 0.9 * all_of_them  # bf16: a leaf that is nearly as likely as another may be expanded in its place


def test_what_the_layers_read_is_what_torch_makes(folder: Path) -> None:
    model = model_of(folder, "bf16")
    head = head_of(model, reads=())
    if head._cell is None:
        pytest.skip(str(cell.missing(head.head.module, head.decoder)))
    generator = torch.Generator().manual_seed(2)
    features, tokens = torch.randn(2, 130, 128, generator=generator).bfloat16()
    module = deepcopy(head.head.module).to(torch.float32)
    with torch.inference_mode():
        assert isinstance(module, Clover2)
        want = module.enter(features.float(), module.token_norm(tokens.float()))
        got = head._cell.enter(features, tokens)
    assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_where_it_is_not_taken(folder: Path) -> None:
    """By the first Clover, in fp32, where sampling or a constraint decides, behind another drafter's guesses."""
    model = model_of(folder, "fp32")
    assert head_of(model)._cell is None
    narrow = model_of(folder, "bf16")
    assert Head(narrow, ready(narrow, shaken("clover", narrow, tokens=DRAFTED)))._cell is None
    made = engine(narrow, head_of(narrow), draft_tokens=4)
    assert made.open("56", raw=True).is_plain
    assert not made.open("56", raw=True, temperature=0.5).is_plain
    assert not made.open("56", raw=True, repetition_penalty=1.5).is_plain
