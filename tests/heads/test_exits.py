"""Exits with matrices of their own: what training sees is what drafting does, and it is worth its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import engine, finish, prompts, tiny
from support.heads import brought, shaken
from support.planted import planted

from longspec.drafters import drafter_of
from longspec.drafters.early_exit import Exit
from longspec.drafters.spec import parse
from longspec.errors import UsageError
from longspec.heads.accuracy import judged
from longspec.heads.exits import Exits, threshold_of
from longspec.heads.format import CONFIG, load_head, new_head, save_head
from longspec.heads.head import Batch, Judged
from longspec.heads.seen import see
from longspec.model.decoder import Skip
from longspec.model.load import Model
from longspec.training.course import start
from longspec.training.train import Recipe

PROMPTS = ["".join(chr(48 + (7 * i + 3 * j * j + j) % 40) for j in range(12 + i % 5)) for i in range(30)]
SAMPLED: dict[str, Any] = {"temperature": 0.3, "seed": 3, "raw": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of which every layer matters, and which is sure of what it writes."""
    return planted(tmp_path_factory.mktemp("target"), Skip(), num_hidden_layers=10)


def thresholds(head: Any) -> list[float]:
    assert isinstance(head.module, Exits)
    return [float(each) for each in head.module.thresholds]


def test_it_is_trained_and_calibrated(model: Model, tmp_path: Path) -> None:
    recipe = Recipe(kind="exits", steps=30, tokens=6000, depth=4, window=96, validations=3)
    said = start(model, recipe, tmp_path / "head", PROMPTS, SAMPLED).run(lambda *_: None)
    assert said is not None
    untrained, begun, trained = brought(model, tmp_path / "head", recipe, SAMPLED)
    assert begun > untrained + 0.1
    assert trained > untrained + 0.1
    head = load_head(tmp_path / "head", model)
    assert head.module.reads == (6, 8, 9)
    assert said["accuracy"] == sorted(said["accuracy"])  # a later exit knows more
    assert thresholds(head) != thresholds(new_head("exits", model))
    drafter = parse(str(tmp_path / "head")).make(model)
    assert isinstance(drafter, Exit)
    assert drafter.thresholds == thresholds(head)
    assert drafter.nbytes > 3 * 4 * model.decoder.config.width**2
    texts = []
    for name in ("none", str(tmp_path / "head")):
        made = engine(model, name)
        session = made.open(PROMPTS[0], max_new_tokens=40, raw=True)
        texts.append(finish(made, [session]))
    assert texts[0] == texts[1]
    assert session.stats.accepted > 0


def test_an_exit_drafts_what_training_computes(model: Model) -> None:
    """The first token of a draft, from the rows that a session's cache lacks, and from a whole pass."""
    tokens = torch.tensor([i for i in range(model.decoder.config.vocabulary) if i % 3])
    head = shaken("exits", model, depth=1, tokens=tokens)
    made = engine(model)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=30)
    for _ in made.prefill(session):
        pass
    for _ in range(4):
        made.step([session])
    text = see(model, session.tokens, 1, head.reads(model))
    states = {layer: value[None].float() for layer, value in text.states.items()}
    with torch.no_grad():
        outs = [*head.module.outputs(Batch(states, torch.empty(0)))]
        wanted = [tokens[(head.module.norm(out.hidden[0, -1]) @ head.rows(model).T).argmax()] for out in outs]
    assert len({int(token) for token in wanted}) > 1
    for number, token in enumerate(wanted):
        drafter = drafter_of(model, head)
        assert isinstance(drafter, Exit)
        drafter.thresholds = [0.0 if number == other else 2.0 for other in range(len(wanted))]
        (draft,) = drafter.propose([session], [5])
        assert draft.tokens.tolist() == [int(token)]
        assert draft.begun is not None
        assert draft.begun.layers[0] == head.module.reads[number]


def test_a_threshold_is_the_lowest_that_keeps_four_of_five() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        probs = torch.rand(40, generator=generator)
        right = torch.rand(40, generator=generator) < probs
        lowest = min((float(p) for p in probs if right[probs >= p].double().mean() >= 0.8), default=1.0)
        assert threshold_of(probs, right) == lowest
    assert threshold_of(torch.tensor([0.5, 0.9]), torch.tensor([False, False])) == 1.0


def test_thresholds_are_told_by_texts(model: Model) -> None:
    head = shaken("exits", model)
    texts = [([5, 9, 11, 40, 41, 42, 43, 50, 51, 52], 3), ([7, 8, 20, 21, 22, 23], 2)]
    told = judged(model, head, [see(model, *text, head.reads(model)) for text in texts])
    assert [text.counted.sum(1).tolist() for text in told] == [[8] * 3, [5] * 3]
    head.module.calibrate(told)
    for number, threshold in enumerate(thresholds(head)):
        own = [text.counted[number] for text in told]
        probs = torch.cat([text.probs[number][at] for text, at in zip(told, own, strict=True)])
        right = torch.cat([text.right[number][at] for text, at in zip(told, own, strict=True)])
        assert threshold == threshold_of(probs, right)


def test_each_exit_drafts_a_chain_up_to_its_first_wrong_token(model: Model) -> None:
    head = new_head("exits", model, depth=3)
    ranks = torch.tensor([[0, 0, 3, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0], [5] * 7])
    told = Judged(torch.ones(3, 7), ranks, torch.tensor([[True] * 6 + [False]] * 3), (0, 0, 0))
    each = torch.tensor([[2.0, 1, 0, 3, 2, 1], [0, 3, 3, 3, 2, 1], [0] * 6])
    torch.testing.assert_close(head.module.kept(told), each.mean(0).double())


def test_its_options(model: Model, tmp_path: Path) -> None:
    save_head(tmp_path / "exits", new_head("exits", model), model)
    save_head(tmp_path / "other", new_head("clover", model), model)
    drafter = parse(f"exit:folder={tmp_path / 'exits'},layers=9/6").make(model)
    assert isinstance(drafter, Exit)
    assert drafter.exits == (6, 9)
    for options, why in {
        f"folder={tmp_path / 'other'}": "holds a clover head, and the drafter exit takes an exits head",
        f"folder={tmp_path / 'exits'},layers=6/7": "has no exits 6/7, but 6/8/9; name some of these",
    }.items():
        with pytest.raises(UsageError, match=why):
            parse(f"exit:{options}").make(model)
    about = json.loads((tmp_path / "exits" / CONFIG).read_text())
    about["longspec"]["reads"] = [9, 6, 8]
    (tmp_path / "exits" / CONFIG).write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"is damaged: its exits \[9, 6, 8\] aren't rising, from 1 to 9"):
        parse(str(tmp_path / "exits")).make(model)


def test_a_model_of_one_layer_has_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="A model of one layer has no early exits"):
        new_head("exits", tiny(tmp_path, num_hidden_layers=1))
