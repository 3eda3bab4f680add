"""Acceptance by meaning: steps, their meanings, the probe and its files, and what it does to texts. It is lossy, and
nobody gets it who didn't ask for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import oracle, write
from support.engines import engine, finish, of_folder
from support.letters import TEMPLATE, tokenizer_of
from support.passes import TOLERANCE, feed
from support.passes import write as feed_all

from longspec.cache import Dense
from longspec.drafters.draft_model import DraftModel
from longspec.drafters.ngram import Ngram
from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.errors import ModelError, UsageError
from longspec.model.load import Model
from longspec.semantic.accept import accepting
from longspec.semantic.meaning import numbers, same
from longspec.semantic.probe import ABOUT, WEIGHTS, Judged, Probe, load_probe, save_probe
from longspec.semantic.steps import Steps
from longspec.text.tokenizer import Vocabulary
from longspec.training.semantic import Examples, Watch, area, fit, limit_of, train_probe

LETTERS = 60  # of the prompts: tokens behind them may end a line
NEW, DRAFTED = 40, 20
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 3}
WAYS: list[dict[str, Any]] = [{}, SAMPLED]


def lines(size: int) -> Vocabulary:
    """One letter a token, but that every fourth of the later ones ends a line, and 2 a text."""
    names = ["<pad>", "<s>", "</s>", *(chr(48 + i) for i in range(size - 3))]
    names = [name + "\n" if i >= LETTERS and i % 4 == 0 else name for i, name in enumerate(names)]
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return Vocabulary(tokenizer_of(names), special, TEMPLATE)


def made(folder: Path, layers: int) -> Model:
    model = of_folder(write(oracle("llama", num_hidden_layers=layers), folder), ())
    return replace(model, vocabulary=lines(model.decoder.config.vocabulary))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made(tmp_path_factory.mktemp("target"), 4)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made(tmp_path_factory.mktemp("draft"), 3)


def prompts(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(4)
    return ["".join(chr(45 + i) for i in torch.randint(3, LETTERS, (70 + n,), generator=generator).tolist())
            for n in range(count)]  # fmt: skip


class Kind:
    """Accepts every step, and keeps it with the text's tokens before it."""

    def __init__(self, steps: Steps, *, each: int = 1) -> None:
        self.steps, self.each = steps, each
        self.taken: list[tuple[Session, int, list[int]]] = []

    def __call__(self, session: Session, draft: Sequence[int], kept: int, states: Any) -> bool:
        if kept == len(draft) or not self.steps.over(draft) or len(session.tokens) % self.each:
            return False
        self.taken.append((session, len(session.tokens), list(draft)))
        return True


def judging(target: Model, draft: Model, judge: Any, **options: Any) -> Engine:
    return Engine(
        target,
        drafter="model+ngram",
        options={"draft": draft, "steps": True},
        draft_tokens=DRAFTED,
        judge=judge,
        **options,
    )


def judge_of(target: Model, threshold: float, seed: int = 0) -> Judged:
    torch.manual_seed(seed)
    probe = Probe(target.decoder.config.width, 16).eval().requires_grad_(False)
    return Judged(probe, threshold, Steps(target.vocabulary, target.end_tokens))


def opened(made: Engine, count: int, **options: Any) -> list[Session]:
    return [made.open(text, raw=True, key=str(i), max_new_tokens=NEW + i, **options)
            for i, text in enumerate(prompts(count))]  # fmt: skip


def test_where_steps_end(target: Model) -> None:
    steps, ids = Steps(target.vocabulary, (2,)), {"A": 20, "3": 6, "?": 18, "x\n": 75}
    assert [target.vocabulary.piece(token, first=False) for token in (20, 6, 18, 72)] == [b"A", b"3", b"?", b"u\n"]
    assert steps.over([ids["A"], ids["?"]])  # a sentence
    assert not steps.over([ids["A"], ids["3"], ids["?"]])  # 3.5 goes on
    assert steps.over([ids["3"], 72])
    assert steps.over([ids["A"], 2])
    assert not steps.over([])
    assert steps.first([20, 6, 72, 20, 18]) == 3
    assert steps.first([20, 6]) is None
    assert steps.text([20, 6, 2]) == "A3"


def test_when_steps_mean_the_same() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert numbers("It costs $1,250.50, or 3 of 4.") == [1250.5, 3, 4]
    for one, other, alike in (
        ("So 16 - 3 - 4 = 9.", "16 - (3 + 4) = 9 eggs\n", True),
        ("That leaves 9.", "16 - 3 - 4 = 9", True),
        ("16 - 3 - 4 = 9", "9 * 2 = 18", False),
        ("16 - 3 = 13", "16 - 4 = 12", False),
        ("16 - 7 = 9", "12 - 3 = 9", False),
        ("It is 9.", "It is nine.", False),
    ):
        assert same(one, other, (east, north)) is alike
    assert same("We add them.", "Add both:", (east, 2 * east))
    assert not same("We add them.", "We take one away.", (east, north))


@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_is_accepted_the_text_is_the_targets(target: Model, draft: Model, way: dict[str, Any]) -> None:
    plain = engine(target)
    want = [finish(plain, [session])[0] for session in opened(plain, 2, **way)]
    for judge in (judge_of(target, 1.0), Watch(Steps(target.vocabulary, (2,)))):
        made = judging(target, draft, judge)
        sessions = opened(made, 2, **way)
        assert finish(made, sessions) == want
        assert [session.meant for session in sessions] == [0, 0]
        assert made.answer(sessions[0]).exactness == "lossy"  # it says what may be, not what happened
    assert plain.generate(prompts(1)[0], raw=True, max_new_tokens=3).exactness != "lossy"


@pytest.mark.parametrize("way", WAYS)
def test_accepted_steps_stay_whole_with_the_targets_own_rows(target: Model, draft: Model, way: dict[str, Any]) -> None:
    judge = Kind(Steps(target.vocabulary, target.end_tokens), each=2)
    made = judging(target, draft, judge)
    sessions = opened(made, 2, **way)
    together = finish(made, sessions)
    assert sum(session.meant for session in sessions) > 3
    plain = engine(target)
    assert together != [finish(plain, [session])[0] for session in opened(plain, 2, **way)]
    for session, at, step in judge.taken:
        assert session.tokens[at : at + len(step)] == step[: len(session.tokens) - at]
    for session, tokens in zip(opened(made, 2, **way), together, strict=True):
        assert finish(made, [session]) == [tokens]  # alone as beside others
        fresh = Dense(target.decoder.shape)
        with torch.inference_mode():  # in which the session's rows were made
            feed_all(target.decoder, fresh, tokens[: session.cache.length])
            one, other = (feed(target.decoder, cache, [20, 30, 40])[1] for cache in (session.cache, fresh))
        assert torch.allclose(one, other, atol=TOLERANCE)
    answer = made.answer(sessions[0])
    assert answer.speculation["meant"] == sessions[0].meant > 0
    assert "meant" not in plain.answer(plain.open("A", raw=True)).speculation


def test_ends_within_an_accepted_step(target: Model, draft: Model) -> None:
    steps = Steps(target.vocabulary, target.end_tokens)
    judge = Kind(steps)
    made = judging(target, draft, judge)
    text = prompts(1)[0]
    whole = made.generate(text, raw=True, max_new_tokens=NEW)
    session, at, step = next(one for one in judge.taken if len(one[2]) > 4)
    before = at - session.prompt_length
    assert list(whole.tokens[before : before + len(step)]) == step
    for limit in (before + 1, before + len(step) - 1, before + len(step), before + len(step) + 1):
        cut = made.generate(text, raw=True, max_new_tokens=limit)
        assert (len(cut.tokens), cut.finish_reason) == (limit, "length")
        # a draft is no longer than the room, so that the last step may be the target's own
        assert cut.tokens[:before] == whole.tokens[:before]
    assert "".join(made.stream(text, raw=True, max_new_tokens=NEW)) == whole.text
    stop = steps.text(step[1:3])
    first = whole.text.find(stop)
    assert made.generate(text, raw=True, max_new_tokens=NEW, stop=stop).text == whole.text[:first]


def test_logprobs_are_the_targets(target: Model, draft: Model) -> None:
    made = judging(target, draft, Kind(Steps(target.vocabulary, target.end_tokens)))
    text = prompts(1)[0]
    answer = made.generate(text, raw=True, max_new_tokens=40, logprobs=0)
    assert answer.logprobs is not None
    assert [told.token for told in answer.logprobs] == list(answer.tokens)
    tokens = [*made.open(text, raw=True).tokens, *answer.tokens]
    _, logits = feed(target.decoder, Dense(target.decoder.shape), tokens[:-1])
    own = torch.log_softmax(logits.float(), -1)[-len(answer.tokens) :]
    want = own.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor([told.logprob for told in answer.logprobs]), want, atol=1e-4)


def test_it_is_never_on_by_itself(target: Model, draft: Model) -> None:
    assert Engine(target, options={"draft": draft}).judge is None
    given: dict[str, Any] = {"draft": draft}
    assert accepting("exact", "auto", given, None) == (
        {"drafter": "auto", "options": given, "draft_tokens": None},
        None,
    )


@pytest.mark.parametrize(
    ("accept", "drafter", "options", "strict", "said"),
    [
        ("typical", "auto", {"draft": "x"}, False, "use exact, or semantic:FOLDER"),
        ("semantic", "auto", {"draft": "x"}, False, "needs a probe"),
        ("semantic:", "auto", {"draft": "x"}, False, "needs a probe"),
        ("semantic:p", "auto", {}, False, "--draft-model"),
        ("semantic:p", "ngram", {"draft": "x"}, False, "the drafter is ngram"),
        ("semantic:p", Ngram(), {"draft": "x"}, False, "use auto, model"),
        ("semantic:p", "auto", {"draft": "x"}, True, "--strict"),
        ("semantic:nowhere", "model", {"draft": "x"}, False, "longspec train semantic"),
    ],
)
def test_what_makes_no_sense_is_refused(
    accept: str, drafter: Any, options: dict[str, Any], strict: bool, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        accepting(accept, drafter, options, None, strict=strict)


def test_a_text_that_is_held_is_refused(target: Model, draft: Model) -> None:
    made = judging(target, draft, judge_of(target, 1.0))
    for options in ({"regex": "a+"}, {"json_schema": "{}"}, {"reasoning_budget": 5}):
        with pytest.raises(UsageError, match="aren't held"):
            made.open("A", raw=True, **options)


def test_steps_are_drafted_whole(target: Model, draft: Model) -> None:
    """Chains up to a border, the same ones with an inner drafter, in fewer passes."""
    alone, over = DraftModel(target, draft, steps=True), DraftModel(target, draft, Ngram(), steps=True)
    steps, count = Steps(target.vocabulary, target.end_tokens), [0, 0]
    for at, drafter in enumerate((alone, over)):
        forward = drafter.forward

        def counted(rows: Any, at: int = at, forward: Any = forward) -> Any:
            count[at] += 1
            return forward(rows)

        drafter.forward = counted  # type: ignore[method-assign]
    made = [Engine(target, drafter=one, control="fixed", draft_tokens=DRAFTED) for one in (alone, over)]
    sessions = [opened(one, 1)[0] for one in made]
    for one, session in zip(made, sessions, strict=True):
        for _ in one.prefill(session):
            pass
    while sessions[0].finish_reason is None:
        room = min(DRAFTED, sessions[0].room - 1)
        first, second = (drafter.propose([session], [room])[0].tokens.tolist()
                         for drafter, session in zip((alone, over), sessions, strict=True))  # fmt: skip
        assert first == second
        assert steps.first(first) in (None, len(first))
        assert len(first) == room or steps.over(first)
        for one, session in zip(made, sessions, strict=True):
            one.step([session])
    assert sessions[0].tokens == sessions[1].tokens
    assert count[1] < count[0]


def test_a_probe_comes_back_and_other_models_or_damaged_files_are_refused(
    target: Model, draft: Model, tmp_path: Path
) -> None:
    judge = judge_of(target, 0.6)
    save_probe(tmp_path, judge.probe, judge.threshold, target, draft, {"area": 0.7})
    found = load_probe(tmp_path, target, draft)
    state = torch.randn(target.decoder.config.width)
    assert found.threshold == 0.6
    assert found.probability(state) == judge.probability(state)
    with pytest.raises(UsageError, match="with the draft model 'tiny'"):
        load_probe(tmp_path, target, target)
    with pytest.raises(UsageError, match="with the target model 'tiny'"):
        load_probe(tmp_path, draft, draft)
    about = json.loads((tmp_path / ABOUT).read_text())
    for name, value in (
        ("threshold", 2),
        ("width", 7),
        ("width", -1),
        ("hidden", 1 << 40),
        ("target", 3),
        ("version", 9),
    ):
        (tmp_path / ABOUT).write_text(json.dumps({**about, name: value}))
        with pytest.raises(UsageError, match=ABOUT):
            load_probe(tmp_path, target, draft)
    (tmp_path / ABOUT).write_text(json.dumps({**about, "hidden": 17}))
    with pytest.raises(ModelError, match="should be"):
        load_probe(tmp_path, target, draft)
    judge.probe.mean[0] = float("nan")
    save_probe(tmp_path, judge.probe, judge.threshold, target, draft, {})
    with pytest.raises(ModelError, match="can't be"):
        load_probe(tmp_path, target, draft)
    (tmp_path / WEIGHTS).write_bytes(b"none")
    with pytest.raises(ModelError):
        load_probe(tmp_path, target, draft)


def test_a_threshold_lets_few_mistakes_pass() -> None:
    chances = [1 - i / 1000 for i in range(1000)]
    labels = [float(i < 600 or i % 2) for i in range(1000)]
    limit = limit_of(chances, labels)
    taken = [label for chance, label in zip(chances, labels, strict=True) if chance > limit]
    assert 600 <= len(taken) < 700
    assert 1 - sum(taken) / len(taken) <= 0.05
    assert limit_of(chances[:10], [1.0] * 10) == 1  # too few to know
    assert limit_of(chances, [0.0] * 1000) == 1
    assert limit_of([0.5] * 100, [1.0] * 100) == 0
    assert area([0.9, 0.8, 0.2], [1, 0, 0]) == 1
    assert area([0.5, 0.5], [1, 0]) == 0.5


def test_a_probe_learns_what_can_be_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, 12, generator=generator)
    texts = [("= 1", "= 1") if state[0] > 0 else ("= 1", "= 2") for state in states]
    examples = Examples(torch.arange(600) // 6, texts, states, states)
    probe, said = fit(examples, examples.prompts < 30, 0)
    assert said["area"] > 0.9
    assert 0.2 < said["accepted_held"] < 0.6
    assert said["wrong_held"] <= 0.05
    with pytest.raises(UsageError, match="40 of each are needed"):
        fit(examples, examples.prompts < 3, 0)
    assert not any(parameter.requires_grad for parameter in probe.parameters())


def test_a_training_from_prompts_to_a_folder(
    target: Model, draft: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspec.training.semantic.ANSWER", 24)
    monkeypatch.setattr("longspec.training.semantic._LEAST", 5)
    monkeypatch.setattr("longspec.training.semantic.STEP_TOKENS", DRAFTED)

    def train(folder: Path, **options: Any) -> dict[str, Any]:
        return train_probe(
            target, draft, folder, prompts(40), {"temperature": 0.7, "seed": 1, **options},
            tokens=10**9, seed=0, report=lambda stage, done, total: None,
        )  # fmt: skip

    said = train(tmp_path / "a", raw=True)
    assert said["examples"] > 20
    groups = sorted((tmp_path / "a" / "work").glob("group-*.json"))
    assert len(groups) == 3
    before = (tmp_path / "a" / WEIGHTS).read_bytes()
    groups[1].unlink()  # as a run that was killed leaves it
    assert train(tmp_path / "a", raw=True) == said
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before
    judge = load_probe(tmp_path / "a", target, draft)
    assert judging(target, draft, judge).generate("ABC", raw=True, max_new_tokens=20).exactness == "lossy"
    with pytest.raises(UsageError, match="sampling differ"):
        train(tmp_path / "a", raw=True, top_k=5)
    groups[0].write_text('{"tokens": 1, "steps": [[0, "a", "b"]]}')
    with pytest.raises(ModelError, match=r"what group-00000\.json says"):
        train(tmp_path / "a", raw=True)
