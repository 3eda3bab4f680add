"""An error of one text ends that text alone; what several texts share is let go when none of them is left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.engines import engine, finish, prompts, tiny

from longspec.cache import BLOCK
from longspec.cache.codes import Codec
from longspec.cache.quantized import Quantized
from longspec.engine.answer import Answer
from longspec.engine.engine import Engine
from longspec.engine.scheduler import Event, Schedule
from longspec.engine.session import Session
from longspec.errors import BudgetError, LongspecError, UsageError, reported
from longspec.model.load import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"))


def opened(made: Engine, texts: Sequence[str], **options: Any) -> list[Session]:
    return [made.open(text, raw=True, key=str(i), max_new_tokens=12, **options) for i, text in enumerate(texts)]


def run(schedule: Schedule, sessions: Sequence[Session]) -> dict[Session, list[Event]]:
    """All that the schedule tells of each session, to the end."""
    events: dict[Session, list[Event]] = {session: [] for session in sessions}
    for session in sessions:
        schedule.add(session)
    for _ in range(500):
        for session, event in schedule.step():
            events[session].append(event)
        if not schedule:
            return events
    raise AssertionError("it never ends")


def written(events: Sequence[Event]) -> list[int]:
    return [token for event in events if not isinstance(event, LongspecError) for token in event.tokens]


def check_alone(made: Engine, texts: Sequence[str], events: dict[Session, list[Event]], faulty: int) -> LongspecError:
    """All texts but one were told all of their tokens; the one was told its error."""
    alone = [session.answer for session in map(_finished(made), enumerate(texts))]
    for i, told in enumerate(events.values()):
        if i != faulty:
            assert written(told) == alone[i]
    error = [*events.values()][faulty][-1]
    assert isinstance(error, LongspecError)
    return error


def _finished(made: Engine) -> Any:
    def finished(numbered: tuple[int, str]) -> Session:
        session = made.open(numbered[1], raw=True, key=str(numbered[0]), max_new_tokens=12)
        finish(made, [session])
        return session

    return finished


# --- an error of one text


def test_a_prompt_that_does_not_fit_ends_alone(model: Model) -> None:
    made, texts = engine(model), prompts(4)

    class Full:
        """A memory guard that finds no memory for the third prompt."""

        def after_chunk(self, session: Session, rows: int) -> None:
            if session.key == "2":
                raise BudgetError("The prompt is too long for the memory.")

        def after_step(self, sessions: Sequence[Session]) -> None:
            return None

    made.watch = Full()  # type: ignore[assignment]
    events = run(Schedule(made, 3), opened(made, texts))
    made.watch = None
    assert isinstance(check_alone(made, texts, events, 2), BudgetError)


def test_a_commit_that_fails_ends_its_text_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made, texts = engine(model), prompts(4)
    sessions = opened(made, texts)
    commit = sessions[1].cache.commit

    def failing(stage: Any, rows: Sequence[int]) -> None:
        if len(sessions[1].answer) > 4:
            raise LongspecError("The cache on disk can't grow.")
        commit(stage, rows)

    monkeypatch.setattr(sessions[1].cache, "commit", failing)
    error = check_alone(made, texts, run(Schedule(made, 3), sessions), 1)
    assert str(error) == "The cache on disk can't grow."


@pytest.mark.parametrize("faulty", [0, 3])
def test_a_pass_that_fails_is_repeated_in_halves(model: Model, monkeypatch: pytest.MonkeyPatch, faulty: int) -> None:
    made, texts, step = engine(model), prompts(6), Engine.step

    def failing(self: Engine, sessions: Sequence[Session], *rest: Any) -> Any:
        if any(session.key == str(faulty) and len(session.answer) > 3 for session in sessions):
            raise ValueError("the pass failed")
        return step(self, sessions, *rest)

    monkeypatch.setattr(Engine, "step", failing)
    events = run(Schedule(made, 4), opened(made, texts))
    monkeypatch.undo()
    error = check_alone(made, texts, events, faulty)
    assert str(error) == "The text could not be written: ValueError: the pass failed."


def test_a_pass_too_large_for_the_memory_is_split(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made, texts, step = engine(model), prompts(5), Engine.step

    def small(self: Engine, sessions: Sequence[Session], *rest: Any) -> Any:
        if len(sessions) > 2:
            raise MemoryError
        return step(self, sessions, *rest)

    monkeypatch.setattr(Engine, "step", small)
    sessions = opened(made, texts)
    events = run(Schedule(made, 5), sessions)
    monkeypatch.undo()
    alone = [session.answer for session in map(_finished(made), enumerate(texts))]
    assert [written(told) for told in events.values()] == alone


def test_prompts_that_cannot_be_opened_give_errors_in_their_places(model: Model) -> None:
    made, (text, *_) = engine(model), prompts(1)
    asked: list[Any] = [text, 7, (text, {"temprature": 1}), [{"role": "user", "content": text}], text]
    answers = dict(made.generate_many(asked, max_new_tokens=4, width=2))
    assert [isinstance(answers[i], Answer) for i in range(5)] == [True, False, False, True, True]
    assert "The prompt is 7; it must be a text" in str(answers[1])
    assert "temprature" in str(answers[2])
    assert all(isinstance(answers[i], LongspecError) for i in (1, 2))


def test_a_token_without_an_embedding_is_refused(model: Model) -> None:
    rows = model.decoder.config.vocabulary
    model.vocabulary.tokenizer.add_tokens(["~beyond~"])
    with pytest.raises(UsageError, match=rf"the token {rows}, and the model's embedding table has {rows} rows"):
        engine(model).open("ABC~beyond~", raw=True)


@pytest.mark.parametrize("wrong", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9}])
def test_logits_that_are_no_numbers_end_their_text_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch, wrong: float, options: dict[str, Any]
) -> None:
    """One column is enough, which no sampler would have chosen; the text beside it goes on."""
    made, texts = engine(model, "lookahead"), prompts(2, 40)
    alone = made.generate(texts[1], raw=True, max_new_tokens=8, **options).tokens
    logits, rows = model.decoder.logits, iter([None, None, 0])

    def broken(hidden: Any) -> Any:
        found = logits(hidden)
        if (row := next(rows, 0)) is not None:
            found[row, 7] = wrong
        return found

    monkeypatch.setattr(model.decoder, "logits", broken)
    asked: list[Any] = [(text, {"key": ""}) for text in texts]
    answers = dict(made.generate_many(asked, raw=True, max_new_tokens=8, **options))
    said = "tokens of prompt and answer the model's logits aren't finite numbers"
    assert isinstance(answers[0], LongspecError)
    assert said in str(answers[0])
    assert isinstance(answers[1], Answer | LongspecError)
    assert said in str(answers[1]) if isinstance(answers[1], LongspecError) else answers[1].tokens == alone


def test_errors_as_they_are_reported() -> None:
    assert reported(error := UsageError("said")) is error
    memory = reported(MemoryError())
    assert isinstance(memory, BudgetError)
    assert isinstance(memory.__cause__, MemoryError)
    assert isinstance(reported(RuntimeError("DefaultCPUAllocator: can't allocate memory")), BudgetError)
    assert str(reported(KeyError("x"))) == "The text could not be written: KeyError: 'x'."
    assert str(reported(ValueError())) == "The text could not be written: ValueError."


def test_an_option_that_is_not_known_is_named(model: Model) -> None:
    made = engine(model)
    for ask in (made.generate, made.stream, made.open):
        with pytest.raises(TypeError, match=r"'temprature' is not an option.*'temperature'"):
            ask("ABC", temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'max_tokens'.*'max_new_tokens'"):
        made.generate_many(["ABC"], max_tokens=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'xyz' is not an option of a text; there are: temperature, "):
        made.open("ABC", xyz=1)  # type: ignore[call-arg]


# --- the trunk: rows that several prompts begin with


def shared_prompts(count: int) -> list[str]:
    beginning = prompts(1, 300)[0]
    return [beginning + tail for tail in ("<=>", "?<>@", "A<C", "BBB")[:count]]


def until_shared(schedule: Schedule, sessions: Sequence[Session]) -> None:
    for session in sessions:
        schedule.add(session)
    while sessions[1].cached == 0:
        schedule.step()


def test_the_trunk_goes_with_its_last_text(model: Model) -> None:
    made = engine(model)
    schedule, sessions = Schedule(made, 4), opened(made, shared_prompts(3))
    until_shared(schedule, sessions)
    trunk = schedule._trunk
    assert trunk is not None
    kept = weakref.ref(trunk.cache)
    del trunk
    while schedule:
        schedule.step()
    gc.collect()
    assert kept() is None
    assert schedule._trunk is None


def test_the_trunk_stays_while_a_text_waits_for_it(model: Model) -> None:
    made, (*texts, late) = engine(model), shared_prompts(4)
    schedule, sessions = Schedule(made, 1), opened(made, texts)
    until_shared(schedule, sessions)
    schedule.add(session := made.open(late, raw=True, max_new_tokens=3))
    while schedule:
        schedule.step()
    assert session.cached == 300


def test_the_trunk_goes_when_its_texts_are_dropped(model: Model) -> None:
    made = engine(model)
    schedule, sessions = Schedule(made, 4), opened(made, shared_prompts(3))
    until_shared(schedule, sessions)
    for session in sessions:
        schedule.drop(session)
    assert schedule._trunk is None


def test_a_text_that_starts_from_the_trunk_says_what_its_cache_is(model: Model) -> None:
    made = engine(model)
    schedule, sessions = Schedule(made, 2), opened(made, shared_prompts(2))
    first = sessions[0]

    class Shrinking:
        """A memory guard that makes the first prompt's cache an int8 one, at its third block."""

        def after_chunk(self, session: Session, rows: int) -> None:
            if session is first and session.cache_name == "dense":
                session.cache, session.cache_name = Quantized.of_dense(session.cache, Codec(8)), "int8"  # type: ignore[arg-type]

        def after_step(self, sessions: Sequence[Session]) -> None:
            return None

    made.watch, made.prefill_rows = Shrinking(), BLOCK  # type: ignore[assignment]
    until_shared(schedule, sessions)
    made.watch = None
    assert isinstance(sessions[1].cache, Quantized)
    assert sessions[1].cache_name == "int8"
    assert not made.answer(sessions[1]).cache_lossless


def test_the_trunk_is_not_for_texts_of_another_rope(tmp_path: Path) -> None:
    """The tiny longrope model's first context has 256 tokens."""
    made, beginning = engine(tiny(tmp_path, "phi3-longrope")), prompts(1, 150)[0]
    texts = [beginning + tail for tail in ("<=>", "?<>@")]
    sessions = [made.open(text, raw=True, max_new_tokens=n) for text, n in zip(texts, (8, 200), strict=True)]
    assert [session.long for session in sessions] == [False, True]
    run(Schedule(made, 2), sessions)
    assert sessions[1].cached == 0
