"""Texts written side by side: the same tokens as alone, whoever shares a pass, and common beginnings read once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from support.engines import engine, finish, prompts, tiny

from longspec.cache import CACHES
from longspec.engine.answer import Answer
from longspec.engine.engine import Engine
from longspec.engine.options import Options
from longspec.engine.scheduler import Schedule, common
from longspec.engine.session import Session
from longspec.errors import UsageError
from longspec.model.decoder import Rows
from longspec.model.load import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"))


def written(made: Engine, sessions: list[Session], width: int) -> list[list[int]]:
    schedule = Schedule(made, width)
    for session in sessions:
        schedule.add(session)
    while len(schedule):
        schedule.step()
    return [session.tokens for session in sessions]


def opened(made: Engine, texts: list[str], **options: Any) -> list[Session]:
    return [made.open(text, raw=True, key=str(i), max_new_tokens=20 + 3 * i, **options) for i, text in enumerate(texts)]


def _combinations() -> Iterator[Any]:
    """Every cache, drafter and way; the usual run has one of each other cache than the dense one."""
    sampled = {"temperature": 0.9, "seed": 3}
    for cache, drafter, sampling in product(CACHES, ("none", "recycle+ngram"), ({}, sampled)):
        usual = cache == "dense" or (drafter != "none" and sampling)
        yield pytest.param(cache, drafter, sampling, marks=[] if usual else pytest.mark.full)


@pytest.mark.parametrize(("cache", "drafter", "sampling"), list(_combinations()))
def test_companions_change_nothing(model: Model, cache: str, drafter: str, sampling: dict[str, Any]) -> None:
    texts = prompts(5)
    texts[3] = texts[2][:130] + texts[3]  # two that begin alike
    plain = engine(model, "none", cache=cache)
    alone = [finish(plain, [session])[0] for session in opened(plain, texts, **sampling)]
    for width in (1, 3):
        made = engine(model, drafter, cache=cache)
        made.prefill_rows = 64
        assert written(made, opened(made, texts, **sampling), width) == alone


def test_a_short_text_makes_room_for_the_next(model: Model) -> None:
    made = engine(model)
    schedule = Schedule(made, 2)
    sessions = [made.open(text, raw=True, max_new_tokens=n) for text, n in zip(prompts(3, 20), (3, 30, 3), strict=True)]
    for session in sessions:
        schedule.add(session)
    ended = []
    while len(schedule):
        ended += [sessions.index(session) for session, _ in schedule.step() if session.finish_reason]
    assert ended == [0, 2, 1]


@pytest.mark.parametrize("cache", CACHES)
def test_a_common_beginning_is_read_once(model: Model, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prompts(1, 300)[0]
    texts = [first + tail for tail in ("<=>", "?<>@", "A<C", "BBB")]
    made = engine(model, cache=cache)
    sessions = opened(made, texts)
    rows: list[int] = []
    forward = made.model.decoder.forward

    def counted(given: Rows, *rest: Any) -> Any:
        rows.append(len(given.tokens))
        return forward(given, *rest)

    monkeypatch.setattr(made.model.decoder, "forward", counted)
    written(made, sessions, 4)
    prompt_rows = sum(rows) - sum(session.stats.steps for session in sessions)
    assert prompt_rows == 300 + sum(len(text) - 300 - 1 for text in texts)
    assert [session.cached for session in sessions] == [0, 300, 300, 300]


def test_a_dropped_session_is_gone(model: Model) -> None:
    made = engine(model)
    schedule = Schedule(made, 2)
    sessions = opened(made, prompts(4))
    for session in sessions:
        schedule.add(session)
    for _ in range(4):
        schedule.step()
    for session in (sessions[0], sessions[3]):
        schedule.drop(session)
    while len(schedule):
        schedule.step()
    assert [session.finish_reason is None for session in sessions] == [True, False, False, True]


def test_what_two_texts_have_in_common() -> None:
    assert [common([1, 2, 3], other) for other in ([1, 2, 4], [1, 2], [], [1, 2, 3, 4], [9])] == [2, 2, 0, 3, 0]


def test_many_answers_from_python(model: Model) -> None:
    made, texts = engine(model, "ngram"), prompts(5, 60)
    prompted: list[str | tuple[str, Options]] = [*texts[:3], "", (texts[3], {"max_new_tokens": 4}), texts[4]]
    given = dict(made.generate_many(prompted, width=2, raw=True, max_new_tokens=12, temperature=0.7, seed=1))
    assert sorted(given) == list(range(6))
    assert isinstance(given[3], UsageError)
    for place, text, length in ((0, texts[0], 12), (4, texts[3], 4), (5, texts[4], 12)):
        alone = made.generate(text, raw=True, max_new_tokens=length, temperature=0.7, seed=1, key=str(place))
        answer = given[place]
        assert isinstance(answer, Answer)
        assert answer.tokens == alone.tokens


def test_prompts_are_taken_as_they_are_needed(model: Model) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield prompts(1, 40)[0]

    answers = engine(model).generate_many(endless(), width=2, raw=True, max_new_tokens=3)
    for _ in range(4):
        next(answers)
    assert taken <= 8
