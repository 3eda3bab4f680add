"""Hidden Transfer: rows without a token run as in training, leave nothing, and are worth their training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import engine, finish, prompts, tiny
from support.heads import brought, shaken

from longspec.drafters.heads.hidden_transfer import HiddenTransfer
from longspec.drafters.spec import parse
from longspec.errors import UsageError
from longspec.heads.format import CONFIG, load_head, new_head, save_head
from longspec.heads.head import Batch
from longspec.heads.seen import batch_of, see
from longspec.heads.transfer import Transfer
from longspec.model.beside import beside
from longspec.training.course import start
from longspec.training.train import Recipe

PROMPTS = ["".join(chr(48 + (7 * i + 3 * j * j + j) % 40) for j in range(12 + i % 5)) for i in range(30)]
SAMPLED: dict[str, Any] = {"temperature": 0.3, "seed": 3, "raw": True}


@pytest.mark.parametrize("family", ["gemma2", "llama", "olmo2", "qwen3"])
def test_drafting_equals_the_unrolled_training(tmp_path: Path, family: str) -> None:
    """Windows, capped scores, norms of heads and behind sub-layers: rows of whole texts, and of the newest position."""
    model = tiny(tmp_path, family, end_tokens=(), num_hidden_layers=7)
    head = shaken("transfer", model, depth=4)
    assert head.module.reads == (4, 5, 7)
    drafter, read = HiddenTransfer(model, head), []
    made = engine(model, drafter, draft_tokens=6)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=40)
    took = drafter.read
    drafter.read = lambda s, rows: (read.append(torch.stack(list(rows))), took(s, rows))[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    for _ in made.prefill(session):
        pass
    for _ in range(4):
        made.step([session])
    states = dict(zip(drafter.needs.layers, torch.cat(read, 1)[:, None], strict=True))
    held = {name: rows.clone() for name, rows in session.cache.state()}
    with torch.inference_mode():
        batch = Batch(states, torch.empty(0), beside=lambda *given: beside(model.decoder, *given))
        wanted = torch.stack([out.hidden[0, -1] for out in head.module.outputs(batch)])
        (got,) = drafter._outputs([session])
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(wanted[0], wanted[1], atol=0.1)
    assert session.cache.length == len(session.tokens) - 1
    assert all(torch.equal(rows, held[name]) for name, rows in session.cache.state())


def test_it_is_trained_and_drafts(tmp_path: Path) -> None:
    model = tiny(tmp_path / "target", end_tokens=(), num_hidden_layers=2)
    recipe = Recipe(kind="transfer", steps=30, tokens=6000, depth=3, window=96, validations=1)
    said = start(model, recipe, tmp_path / "head", PROMPTS, SAMPLED).run(lambda *_: None)
    assert said is not None
    untrained, _, trained = brought(model, tmp_path / "head", recipe, SAMPLED)
    assert trained > untrained + 0.1
    assert len(said["accuracy"]) == 3
    assert isinstance(load_head(tmp_path / "head", model).module, Transfer)
    texts = []
    for name in ("none", str(tmp_path / "head")):
        made = engine(model, name)
        sessions = [made.open(prompt, max_new_tokens=40, raw=True) for prompt in PROMPTS[:3]]
        texts.append(finish(made, sessions))
    assert texts[0] == texts[1]
    assert sum(session.stats.accepted for session in sessions) > 0


def test_what_it_cannot_run_through_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="A model of one layer has none where rows could join"):
        new_head("transfer", tiny(tmp_path / "one", num_hidden_layers=1))
    model = tiny(tmp_path / "target", "qwen3_5", end_tokens=())
    head = new_head("transfer", model)
    layers = head.reads(model)
    batch, _ = batch_of(model, [see(model, [5, 6, 7, 8, 9], 2, layers)], layers)
    with pytest.raises(UsageError, match=r"can't be run through the layers of .*; train another kind of head"):
        next(iter(head.module.outputs(batch)))


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path / "target", num_hidden_layers=4)
    save_head(tmp_path / "head", new_head("transfer", model), model)
    about = json.loads((tmp_path / "head" / CONFIG).read_text())
    for reads in ([0, 2, 4], [3, 2, 4], [1, 2, 3], [2, 4]):
        about["longspec"]["reads"] = reads
        (tmp_path / "head" / CONFIG).write_text(json.dumps(about))
        with pytest.raises(
            UsageError, match=r"is damaged: (the layers .* rising up to 4|it reads the layers \[2, 4\])"
        ):
            parse(str(tmp_path / "head")).make(model)
