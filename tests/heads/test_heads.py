"""Trained heads: what they draft is what training unrolls, they never change a text, and a file is for one model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.engines import engine, finish, prompts, tiny, vocabulary, with_heads
from support.heads import shaken, some
from support.native import SIZES, coded
from support.real import exact

from longspec.cache import CACHES
from longspec.drafters import drafter_of
from longspec.drafters.heads.clover import Head
from longspec.drafters.heads.one_pass import Layered
from longspec.errors import LongspecError, ModelError, UsageError
from longspec.heads import KINDS
from longspec.heads.format import CONFIG, SHIPPED, WEIGHTS, load_head, new_head, save_head
from longspec.heads.head import Batch
from longspec.heads.one_pass import OnePass
from longspec.heads.parallelspec import reading
from longspec.heads.recurrent import Recurrent
from longspec.model.load import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("target"), end_tokens=())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cache", "options", "texts"), with_heads(CACHES))
def test_a_head_never_changes_a_text(
    model: Model, kind: str, cache: str, options: Any, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.early_exit._MOST", 0.0)  # after a step without a bet exits are always taken
    written = []
    for drafter in ("none", drafter_of(model, shaken(kind, model, depth=4, tokens=some(model)))):
        made = engine(model, drafter, cache=cache, draft_tokens=7)
        sessions = [
            made.open(prompt, raw=True, max_new_tokens=25, key=str(i), **options)
            for i, prompt in enumerate(prompts(texts, 70))
        ]
        written.append(finish(made, sessions))
    assert written[0] == written[1]
    assert sum(session.stats.drafted for session in sessions) > 40 * texts


@pytest.mark.parametrize("kind", [kind for kind, module in KINDS.items() if issubclass(module, Recurrent)])
@pytest.mark.parametrize("window", [512, 40])
def test_drafting_equals_the_unrolled_training(
    model: Model, kind: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a text of several steps: the first chain's hidden states, from the head's caches and all at once."""
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_BREADTH", 1)
    head = shaken(kind, model, depth=4, window=window)
    drafter, outs, features = Head(model, head), [], []
    made = engine(model, drafter, draft_tokens=6)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=40)
    read, forward = drafter.read, drafter.forward
    drafter.read = lambda s, rows: (features.append(torch.stack(list(rows))), read(s, rows))[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    for _ in made.prefill(session):
        pass
    for _ in range(4):
        made.step([session])
    drafter.forward = lambda rows: outs.append(forward(rows)) or outs[-1]  # type: ignore[method-assign, func-returns-value]
    (draft,) = drafter.propose([session], [6])
    assert draft.parents.tolist() == [-1, 0, 1, 2, 3][: len(draft)]
    got = torch.cat(outs)
    assert len(got) == 4 + (len(draft) > 4)
    text = [*session.tokens, *draft.tokens.tolist()]
    rows = torch.cat(features, 1)
    assert rows.shape[1] == len(session.tokens) - 1
    states = torch.nn.functional.pad(rows, (0, 0, 0, 1 + len(draft)))[:, None]
    batch = Batch(dict(zip(head.reads(model), states, strict=True)), model.decoder.embed(torch.tensor([text])))
    with torch.no_grad():
        unrolled = list(head.module.outputs(batch))
    want = torch.stack([out.hidden[0, len(session.tokens) - 2] for out in unrolled])
    torch.testing.assert_close(got[:4], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind, module in KINDS.items() if issubclass(module, OnePass)])
@pytest.mark.parametrize("window", [512, 40])
def test_drafting_in_one_pass_equals_the_training_s(
    model: Model, kind: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a text of several steps: the logits of every depth, from the head's cache and from a whole text."""
    head = shaken(kind, model, depth=4, window=window, tokens=some(model))
    drafter, features = Layered(model, head), []
    made = engine(model, drafter, draft_tokens=6)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=40)
    read = drafter.read
    drafter.read = lambda s, rows: (features.append(torch.stack(list(rows))), read(s, rows))[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    for _ in made.prefill(session):
        pass
    for _ in range(4):
        made.step([session])
    with torch.inference_mode():
        assert drafter.rooms([session], [6]) == [6]
        got = drafter.run([session])[0]
    newest = len(session.tokens) - 2
    states = torch.nn.functional.pad(torch.cat(features, 1), (0, 0, 0, 6))[:, None]  # [layers, 1, n, W]
    embedded = torch.nn.functional.pad(model.decoder.embed(torch.tensor([session.tokens])), (0, 0, 0, 5))
    assert states.shape[2] == embedded.shape[1] > window * (window < 512)
    with torch.no_grad():
        outs = list(head.module.outputs(Batch(dict(zip(head.reads(model), states, strict=True)), embedded)))
    assert [out.behind for out in outs] == [1, 2, 3, 4]
    for depth, out in enumerate(outs):
        places = torch.arange(out.hidden.shape[1]) if out.places is None else out.places
        (own,) = (places == newest).nonzero()[:, 0]
        want = head.module.norm(out.hidden[0, own]) @ head.rows(model).T
        torch.testing.assert_close(got[depth], want, atol=1e-4, rtol=1e-4)


def test_specformer_drafts_a_chain_for_each_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest token of every depth, of two texts in one pass as of each alone."""
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.0)
    head = shaken("specformer", model, depth=4, tokens=some(model))
    drafter = Layered(model, head)
    made = engine(model, drafter)
    sessions = [made.open(prompt, raw=True, max_new_tokens=9) for prompt in prompts(2)]
    for session in sessions:
        for _ in made.prefill(session):
            pass
    made.step(sessions)
    drafts = drafter.propose(sessions, [7, 7])
    for session, draft in zip(sessions, drafts, strict=True):
        assert draft.parents.tolist() == [-1, 0, 1, 2]
        with torch.inference_mode():
            best = drafter.run([session])[0].argmax(-1)
        assert draft.tokens.tolist() == some(model)[best].tolist()


def test_masks_read_the_text_before_them_and_their_own_group() -> None:
    """Against the rule said row by row."""
    anchors, depths = torch.tensor([0, 1, 2, 3, 1, 3, 3]), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    got = reading(anchors, depths, 3)
    rows = list(zip(anchors.tolist(), depths.tolist(), strict=True))
    for i, (anchor, depth) in enumerate(rows):
        want = [
            (before <= anchor if deep == 0 else before == anchor and deep <= depth)
            and anchor + depth - before - deep < 3
            for before, deep in rows
        ]
        assert got[i].tolist() == want


@pytest.mark.parametrize("drafter", ["", "recycle+", "recycle+ngram+"])
def test_a_head_drafts_for_a_schedule_and_for_another_drafter(model: Model, tmp_path: Path, drafter: str) -> None:
    """Prompts are read in the passes of texts that are being written, and share their rows; a grammar holds one."""
    save_head(tmp_path / "head", shaken("clover2", model, depth=4, tokens=some(model)), model)
    asked: list[Any] = [(prompt, {"raw": True}) for prompt in (*prompts(3), *prompts(2))]
    asked.append((prompts(1)[0], {"raw": True, "regex": "[A-F]{9}(abc)*[0-9]{5}"}))
    written = []
    for name in ("none", f"{drafter}{tmp_path / 'head'}"):
        made = engine(model, name, draft_tokens=7)
        answers = dict(made.generate_many(asked, width=3, max_new_tokens=25, seed=2, temperature=0.7))
        written.append([answers[i].tokens for i in range(len(asked))])  # type: ignore[union-attr]
    assert written[0] == written[1]
    assert sum(answer.speculation["drafted"] for answer in answers.values()) > 50  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["clover2", "cerberus", "parallelspec", "specformer"])
def test_a_head_drafts_for_the_int8_form_of_its_target(tmp_path: Path, kind: str) -> None:
    folder = write(oracle("llama", **SIZES), tmp_path / "model")
    plain, codes = (
        Model("tiny", dtype, made, vocabulary(made.config.vocabulary), (), {}, {})
        for dtype, made in (("bf16", load(folder, torch.bfloat16)), ("int8", coded(folder)))
    )
    assert plain.lineage == codes.lineage
    save_head(tmp_path / "head", shaken(kind, plain, tokens=some(plain)), plain)
    torch.testing.assert_close(codes.decoder.head, plain.decoder.head, atol=0.02, rtol=0.05)
    texts = []
    for drafter in ("none", str(tmp_path / "head")):
        made = engine(codes, drafter)
        session = made.open(prompts(1)[0], raw=True, max_new_tokens=20)
        texts += finish(made, [session])
    assert texts[0] == texts[1]
    assert session.stats.drafted > 0


def test_a_head_begins_behind_the_rows_of_a_snapshot(model: Model, tmp_path: Path) -> None:
    """Their hidden states are never seen: it bets with what came after."""
    (prompt,) = prompts(1)
    options: Any = {"raw": True, "max_new_tokens": 30, "prompt_cache": tmp_path / "rows"}
    plain = engine(model).generate(prompt, **options)
    assert (tmp_path / "rows").exists()
    session = engine(model).open(prompt, **options)
    assert session.cached > 0
    made = engine(model, Head(model, shaken("clover2", model)))
    session = made.open(prompt, **options)
    for _ in made.write(session):
        pass
    assert tuple(session.answer) == plain.tokens
    assert session.stats.drafted > 0


def test_it_bets_nothing_on_a_text_that_it_did_not_read(model: Model) -> None:
    drafter = Head(model, shaken("clover", model))
    session = engine(model).open(prompts(1)[0], raw=True)
    drafter.begin(session)
    assert len(drafter.propose([session], [5])[0]) == 0


DEEPER = ("medusa", "cerberus", "parallelspec", "specformer", "transfer")
"""Kinds with a matrix, or a row, for each depth."""


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_made_before_the_file_has_its_shapes(
    model: Model, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config of a few bytes may ask for matrices of gigabytes."""
    save_head(tmp_path, new_head(kind, model, depth=3), model)
    about = json.loads((tmp_path / CONFIG).read_text())
    (asked,) = about["speculators_config"]["proposal_methods"]
    asked["speculative_tokens"] = 64
    (tmp_path / CONFIG).write_text(json.dumps(about))
    monkeypatch.setattr("longspec.heads.format.new_head", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError if kind in DEEPER else ZeroDivisionError):
        load_head(tmp_path, model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads", [[], [1], [0, 1, 2, 3, 4]], ids=str)
def test_a_head_reads_as_many_layers_as_its_kind(model: Model, tmp_path: Path, kind: str, reads: list[int]) -> None:
    save_head(tmp_path, new_head(kind, model, depth=3), model)
    about = json.loads((tmp_path / CONFIG).read_text())
    if len(about["longspec"]["reads"]) == len(reads) or (not reads and issubclass(KINDS[kind], Recurrent)):
        return
    about["longspec"]["reads"] = reads
    (tmp_path / CONFIG).write_text(json.dumps(about))
    with pytest.raises(LongspecError) as refused:
        load_head(tmp_path, model)
    assert refused.value.exit_code in (2, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("int8", [False, True])
def test_a_file_gives_the_head_back(model: Model, tmp_path: Path, kind: str, int8: bool) -> None:
    head = shaken(kind, model, depth=3, window=77, tokens=some(model))
    save_head(tmp_path, head, model, int8=int8)
    back = load_head(tmp_path, model)
    assert (back.kind, back.depth, back.window) == (kind, 3, 77)
    assert back.tokens is not None
    assert torch.equal(back.tokens, some(model))
    for name, value in head.module.state_dict().items():
        near = value.abs().amax(-1, keepdim=True) / 250 if int8 and value.dim() == 2 else torch.zeros(1)
        assert bool(((back.module.state_dict()[name] - value).abs() <= near).all()), name
    assert not list(tmp_path.glob(".*"))


def test_another_model_s_head_is_refused(model: Model, tmp_path: Path) -> None:
    save_head(tmp_path / "head", new_head("clover", model), model)
    other = tiny(tmp_path / "other", family="llama-tied-biased")
    with pytest.raises(UsageError, match=r"trained for 'tiny', whose weights or shape are not those of tiny"):
        load_head(tmp_path / "head", other)


def test_auto_takes_the_head_that_comes_with_longspec(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspec.heads.format.SHIPPED", tmp_path / "shipped")
    with pytest.raises(UsageError, match=r"No clover2 head comes with longspec for tiny; name the folder of one"):
        engine(model, "clover2")
    save_head(tmp_path / "shipped" / "one", new_head("clover2", model), model)
    model, other = (  # without the heads of their own, which `auto` would take too
        replace(each, checkpoint=None) for each in (model, tiny(tmp_path / "another", family="llama-tied-biased"))
    )
    assert list(engine(model, "clover2").speculator.drafters) == ["clover2"]
    assert list(engine(other, "auto", control="goodput").speculator.drafters) == ["recycle+ngram"]
    assert list(engine(model, "auto", control="goodput").speculator.drafters) == ["recycle+ngram"]  # in fp32
    assert list(engine(replace(model, dtype="bf16"), "auto").speculator.drafters) == ["recycle+ngram+clover2"]


def test_what_is_shipped_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 12 << 20


def test_damaged_heads_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config.* can't be read: No such file"):
        load_head(tmp_path / "nowhere", model)
    save_head(tmp_path, new_head("clover", model, tokens=some(model)), model)
    about = json.loads((tmp_path / CONFIG).read_text())
    own, asked = about["longspec"], about["speculators_config"]
    changes: list[Any] = [{"longspec": {}}, {"longspec": {**own, "window": 0}}, {"speculators_model_type": "magic"}]
    changes += [{"speculators_config": {}}, {"speculators_config": {**asked, "proposal_methods": []}}]
    changes += [{"speculators_config": {**asked, "proposal_methods": [{"speculative_tokens": 10**9}]}}]
    for change in changes:
        (tmp_path / CONFIG).write_text(json.dumps({**about, **change}))
        with pytest.raises(UsageError, match=r"no head that this longspec knows|is damaged"):
            load_head(tmp_path, model)
    (tmp_path / CONFIG).write_text("{" * 100_000)
    with pytest.raises(UsageError, match="holds more than 64 KiB"):
        load_head(tmp_path, model)
    (tmp_path / CONFIG).write_text(json.dumps({**about, "speculators_model_type": "clover2"}))
    with pytest.raises(ModelError, match=r"is damaged or of another shape"):
        load_head(tmp_path, model)
    (tmp_path / CONFIG).write_text(json.dumps({**about, "draft_vocab_size": 17}))
    with pytest.raises(ModelError, match="don't agree on the draft vocabulary"):
        load_head(tmp_path, model)
    (tmp_path / CONFIG).write_text(json.dumps(about))
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="expected"):
        load_head(tmp_path, model)


@pytest.mark.real
def test_a_head_never_changes_the_default_model_s_text(tmp_path: Path) -> None:
    model = exact()
    tokens = torch.arange(0, model.decoder.config.vocabulary, 24)[:2048]
    save_head(tmp_path, shaken("clover2", model, tokens=tokens), model, int8=True)
    texts = []
    for drafter in ("none", str(tmp_path)):
        made = engine(model, drafter)
        session = made.open("Why is the sky blue?", max_new_tokens=16, temperature=0.8, seed=1)
        texts += finish(made, [session])
    assert texts[0] == texts[1]
    assert session.stats.drafted > 0
