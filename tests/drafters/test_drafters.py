"""The drafters that run a model: what they draft against naive forms, and what they leave in the target's cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import engine, fits, prompts, tiny, vocabulary

from longspec.drafters import DRAFTERS
from longspec.drafters.auto import LARGE, auto
from longspec.drafters.draft_model import DraftModel, match
from longspec.drafters.early_exit import Exit
from longspec.drafters.layer_skip import Skipping, save_skip, usual
from longspec.drafters.sparse_attention import VIEWS, Sparse
from longspec.drafters.spec import parse
from longspec.engine.engine import Engine
from longspec.engine.forward import Input, logits_of
from longspec.engine.session import Session
from longspec.errors import UsageError
from longspec.model.decoder import Chunk, Rows, Skip
from longspec.model.load import Model
from longspec.sampling.verify import verify
from longspec.types import Draft

SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("target"), end_tokens=(), num_hidden_layers=6)


@pytest.fixture
def unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights is never sure; chains of its best tokens are drafted all the same."""
    monkeypatch.setattr("longspec.drafters.common.tree_growth.FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.common.tree_growth.BREADTH", 1)


def started(made: Engine, **options: Any) -> Session:
    """A session whose prompt is prefilled and that has made a few steps."""
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=60, **options)
    for _ in made.prefill(session):
        pass
    for _ in range(3):
        made.step([session])
    return session


def chain(model: Model, session: Session, length: int, skip: Skip) -> list[int]:
    """What the model would write with sub-layers left out, token by token, each from one pass over all guessed rows."""
    guess: list[int] = []
    for _ in range(length):
        stage, tokens = session.cache.open(), [*session.unfed, *guess]
        rows = Rows.of(
            [Chunk(stage, stage.add(range(-1, len(tokens) - 1)), tokens, session.cache.length, False)],
            model.decoder.device,
        )
        with torch.inference_mode():
            logits = model.decoder.logits(model.decoder.forward(rows, skip=skip)[-1:])
        guess.append(int(session.rank(logits, [guess], 1)[0]))
    return guess


def best_path(draft: Draft) -> list[int]:
    """From the text on, always the first child: the path that the drafter expanded first."""
    path, at = [], -1
    while (child := next((i for i, parent in enumerate(draft.parents.tolist()) if parent == at), None)) is not None:
        path.append(int(draft.tokens[child]))
        at = child
    return path


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("inner", [None, "ngram"])
def test_a_skipping_draft_is_what_the_skipping_model_writes(model: Model, options: Any, inner: str | None) -> None:
    made = engine(model, "ngram")
    session = started(made, **options)
    drafter = Skipping(model.decoder, inner=made.speculator.drafters["ngram"] if inner else None)
    length, held = session.cache.length, {name: rows.clone() for name, rows in session.cache.state()}
    for limit in (1, 2, 7, 20):
        (draft,) = drafter.propose([session], [limit])
        path = best_path(draft)
        assert path == chain(model, session, len(path), drafter.skip)
        assert len(draft) <= limit
        assert draft.probs is not None
        probs, parents = draft.probs.tolist(), draft.parents.tolist()
        assert all(parent < 0 or probs[i] <= probs[parent] for i, parent in enumerate(parents))
    assert session.cache.length == length
    assert all(torch.equal(rows, held[name]) for name, rows in session.cache.state())


def test_an_inner_drafter_saves_passes_and_changes_no_draft(model: Model, unsure: None) -> None:
    """The skipping model repeats a phrase, so that n-grams are right about it."""
    made = engine(model, "ngram")
    session = started(made)
    count = 0
    forward = type(model.decoder).forward

    def counted(self: Any, *given: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return forward(self, *given, **options)

    drafts, passes = [], []
    for inner in (None, made.speculator.drafters["ngram"]):
        count = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model.decoder), "forward", counted)
            drafts += Skipping(model.decoder, Skip(), inner).propose([session], [24])
        passes.append(count)
    assert drafts[0].tokens.tolist() == drafts[1].tokens.tolist()
    assert drafts[0].parents.tolist() == drafts[1].parents.tolist()
    assert passes[1] <= passes[0]


def test_the_whole_model_as_its_own_drafter_is_always_kept(model: Model, unsure: None) -> None:
    """Nothing skipped, the same noise: every token of the first path is the target's own."""
    for options in ({}, SAMPLED):
        made = engine(model, Skipping(model.decoder, Skip()), draft_tokens=6)
        session = started(made, **options)
        assert session.stats.tokens_per_step > 3
        for drafter in ("sparse", "model"):
            made = engine(model, drafter, draft_tokens=6)
            assert started(made, **options).stats.tokens_per_step > 3, drafter


@pytest.mark.parametrize("cache", ["dense", "int8", "dual"])
@pytest.mark.parametrize("exits", [(2,), (1, 3, 5)])
def test_rows_that_an_exit_has_begun_give_the_logits_of_a_full_pass(model: Model, cache: str, exits: Any) -> None:
    """Row by row: 1e-5 in fp32, as rows that share a pass with others differ in their last bits."""
    made = engine(model, "none", cache=cache)
    sessions = [started(made, key=str(i)) for i in range(3)]
    drafter = Exit(model, exits=exits)
    drafter.thresholds = [0.02 * (i + 1) for i in range(len(exits))][::-1]
    drafts = drafter.propose(sessions, [5, 1, 9])
    assert sum(len(draft) for draft in drafts) > 5
    with torch.inference_mode():
        inputs = [Input.of(s, s.unfed, d) for s, d in zip(sessions, drafts, strict=True)]
        ends = [0, *accumulate(1 + len(one.draft) for one in inputs)]
        got = logits_of(inputs, model.decoder)
        for i, (session, draft) in enumerate(zip(sessions, drafts, strict=True)):
            stage = session.cache.open()
            tokens = [*session.unfed, *draft.tokens.tolist()]
            staged = stage.add(range(-1, len(tokens) - 1))
            alone = Rows.of([Chunk(stage, staged, tokens, session.cache.length, False)], model.decoder.device)
            want = model.decoder.logits(model.decoder.forward(alone))
            own = got[ends[i] : ends[i + 1]]
            torch.testing.assert_close(own, want[-len(own) :], atol=1e-5, rtol=1e-5)
    for one in inputs:
        one.commit([])  # all layers are there


def test_exits_adapt_to_what_is_kept(model: Model) -> None:
    drafter = Exit(model, exits=(2, 4))
    session = started(engine(model, "none"))
    drafter.thresholds = [0.0, 0.0]
    for _ in range(300):
        (draft,) = drafter.propose([session], [3])
        wrong = [-1] * (len(draft) + 1)
        drafter.observe(session, None, verify(draft.tokens.tolist(), draft.parents.tolist(), wrong))  # type: ignore[arg-type]
    assert max(drafter.thresholds) > 0.1
    high = list(drafter.thresholds)
    drafter.thresholds = [0.9, 0.9]
    for _ in range(100):  # nothing is sure enough: it tries again after a while
        if len(drafter.propose([session], [3])[0]):
            break
        drafter.observe(session, None, verify([], [], [1]))  # type: ignore[arg-type]
    assert min(drafter.thresholds) < 0.9
    assert high


def test_a_draft_model_computes_a_kept_row_once(model: Model, unsure: None) -> None:
    """The same model drafts, so that nearly all is kept: after the prompt a pass feeds it a token or two."""
    drafter = DraftModel(model, model)
    made = engine(model, drafter, draft_tokens=5)
    session = made.open(prompts(1, 700)[0], raw=True, max_new_tokens=60)
    for _ in made.prefill(session):
        pass
    for _ in range(2):
        made.step([session])
    assert drafter._notes[session].cache.length >= session.prompt_length - 1
    fed = []
    forward = drafter.forward
    drafter.forward = lambda rows: fed.append(len(rows.tokens)) or forward(rows)  # type: ignore[method-assign, func-returns-value]
    for _ in range(5):
        made.step([session])
    assert max(fed) <= 2
    assert drafter._notes[session].cache.length >= len(session.tokens) - 8


def test_another_vocabulary_is_mapped_or_refused(tmp_path: Path, model: Model) -> None:
    size = model.decoder.config.vocabulary
    assert match(model, model) is None
    other = tiny(tmp_path / "other", end_tokens=(), vocab_size=size + 7, num_hidden_layers=1)
    places = match(model, other)
    assert places is not None
    assert places.tolist() == list(range(size))
    written = started(engine(model, DraftModel(model, other), draft_tokens=5)).tokens
    plain = engine(model, "none").generate(prompts(1)[0], raw=True, max_new_tokens=60).tokens
    assert tuple(written[len(prompts(1)[0]) :]) == plain[: len(written) - len(prompts(1)[0])]
    small = tiny(tmp_path / "small", end_tokens=(), vocab_size=size // 2, num_hidden_layers=1)
    small = replace(small, vocabulary=vocabulary(size // 2))
    with pytest.raises(UsageError, match=r"has 4\d of the 9\d tokens"):
        match(model, small)


@pytest.mark.parametrize("name", [name for name in DRAFTERS if fits(name, "llama")])
def test_no_drafter_exceeds_its_limit(model: Model, name: str) -> None:
    drafter = parse(name, {"draft": model} if name == "model" else {}).make(model)
    session = started(engine(model, "ngram"))
    drafter.begin(session)
    for ahead in (None, [[5, 6, 7]]):
        for limit in (0, 1, 3, 40):
            (draft,) = drafter.propose([session], [limit], ahead)
            assert len(draft) <= limit
            assert draft.tokens.dtype == draft.parents.dtype == torch.int64
            assert all(-1 <= parent < i for i, parent in enumerate(draft.parents.tolist()))


def test_names_of_drafters(model: Model) -> None:
    for name, why in {
        "magic": r"no drafter named 'magic'; use auto or one of: none, ngram",
        "lookahead+skip": r"The drafter lookahead takes no other's drafts",
        "recycle+exit": r"The drafter exit drafts for no other",
        "skip+": r"no drafter named ''",
        "model": r"needs a draft model",
    }.items():
        with pytest.raises(UsageError, match=why):
            parse(name)
    assert isinstance(parse("skip+sparse+ngram").make(model), Skipping)


def test_the_name_of_a_folder_may_have_a_plus_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a+b"
    folder.mkdir()
    (folder / "config.json").write_text('{"medusa_num_heads": 2}')
    for name in (f"recycle+ngram+{folder}", str(folder), "recycle+ngram"):
        assert parse(name).name == name


def test_auto_is_several_drafters() -> None:
    def names(given: dict[str, Any], **more: Any) -> list[str]:
        return [spec.name for spec in auto(given, **more)]

    assert names({}) == ["recycle+ngram"]
    assert names({}, heads=["clover2"]) == ["recycle+ngram+clover2"]
    assert names({"draft": "some", "remember": True}) == ["model+ngram", "recycle+suffix"]
    assert names({}, nbytes=LARGE) == ["recycle+ngram", "skip+ngram"]
    assert names({}, nbytes=LARGE, mtp=True) == ["mtp", "recycle+ngram"]
    assert names({"draft": "some"}, mtp=True) == ["model+ngram", "recycle+ngram"]


def test_options_stand_behind_a_name(model: Model) -> None:
    assert parse("recycle+ngram:floor=0.2").make(model).inner.floor == 0.2  # type: ignore[union-attr]
    assert parse("lookahead:window=3,ngram=2").make(model).window == 3  # type: ignore[attr-defined]
    assert parse("model:draft=Qwen/Qwen3-0.6B+ngram").parts[0].options == {"draft": "Qwen/Qwen3-0.6B"}
    for name, why in {
        "ngram:ceiling=1": r"ngram has no option 'ceiling=1'; it takes floor",
        "exit:deep": r"exit has no option 'deep'; it takes layers",
        "none:deep=1": r"none has no option 'deep=1'; it takes none",
        "ngram:floor=low": r"floor=low of the drafter ngram should be a number",
        "ngram:floor=-0.1": r"floor=-0.1 of the drafter ngram should be a number from 0",
        "ngram:floor=nan": r"floor=nan of the drafter ngram should be a number from 0",
        "lookahead:window=-7": r"window=-7 of the drafter lookahead should be a number from 0",
        "suffix:remember=maybe": r"should be yes or no",
    }.items():
        with pytest.raises(UsageError, match=why):
            parse(name)
    with pytest.raises(UsageError, match=r"sparse has no view 'all'"):
        parse("sparse:view=all").make(model)
    for wrong in ("6", "0/2", "two", "2/"):
        with pytest.raises(UsageError, match=rf"exit:layers={wrong} should be numbers from 1 to 5 with / between"):
            parse(f"exit:layers={wrong}").make(model)
    for wrong in ("window=0", "ngram=1", "guesses=0"):
        with pytest.raises(UsageError, match="lookahead takes a window and guesses of at least 1"):
            parse(f"lookahead:{wrong}").make(model)


def test_options_reach_what_drafts(model: Model, tmp_path: Path) -> None:
    lookahead = parse("lookahead:window=7,ngram=5,guesses=3").make(model)
    assert (lookahead.window, lookahead.ngram, lookahead.guesses) == (7, 5, 3)  # type: ignore[attr-defined]
    assert parse("exit:layers=4/2").make(model).exits == (2, 4)  # type: ignore[attr-defined]
    for name, view in VIEWS.items():
        made = parse(f"sparse:view={name}+ngram").make(model)
        assert isinstance(made, Sparse)
        assert made.view is view
    save_skip(tmp_path / "set", Skip(frozenset({2}), frozenset({3})), model, {})
    skipping = parse(f"skip:set={tmp_path / 'set'}").make(model)
    assert isinstance(skipping, Skipping)
    assert skipping.skip == Skip(frozenset({2}), frozenset({3}))


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("lookahead:window=3,ngram=3,guesses=2", "dense"),
        ("exit:layers=1/5", "dense"),
        ("sparse:view=window", "int8"),
        ("sparse:view=upper", "dual"),
        ("sparse:view=upper", "dense"),
    ],
)
def test_options_change_no_text(model: Model, name: str, cache: str) -> None:
    (prompt,) = prompts(1, 260)
    sampled: Any = {"raw": True, "max_new_tokens": 24, **SAMPLED}
    texts = [
        engine(model, drafter, cache=cache, draft_tokens=12).generate(prompt, **sampled) for drafter in ("none", name)
    ]
    assert texts[0].tokens == texts[1].tokens
    assert texts[1].speculation["drafted"] > 0


def test_several_drafters_write_the_same_text(model: Model) -> None:
    """Each step takes one of them; all of them follow the text."""
    prompt = prompts(1, 200)[0]
    plain = engine(model).generate(prompt, raw=True, max_new_tokens=90)
    made = Engine(model, drafter="auto", options={"draft": model})
    assert [*made.speculator.drafters] == ["model+ngram", "recycle+ngram"]
    answer = made.generate(prompt, raw=True, max_new_tokens=90)
    assert answer.tokens == plain.tokens
    assert answer.speculation["drafter"] == "auto"
    assert answer.speculation["accepted"] > 0


def test_the_usual_skip_leaves_the_ends_alone() -> None:
    assert usual(2) == Skip()
    assert usual(30).attention == {7, 11, 15, 19}
