"""The engine as Python programs use it: its end, its name, tasks, several answers, and a pydantic class for one."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from support.engines import engine, prompts, tiny
from support.letters import TEMPLATE, tokenizer_of

from longspec.errors import UsageError
from longspec.model.load import Model
from longspec.text.tokenizer import Vocabulary

TEXTS = prompts(6, 60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"))


def test_it_says_what_it_is_and_ends(model: Model) -> None:
    with engine(model) as made:
        assert repr(made) == "<Engine tiny: fp32 on cpu, drafter none>"
        stream = made.stream(TEXTS[0], raw=True, max_new_tokens=40)
        assert next(stream)
    assert repr(made) == "<Engine, closed>"
    made.close()
    for call in (lambda: made.generate("a"), lambda: made.open("a"), lambda: made.score(["ab"])):
        with pytest.raises(UsageError, match="This engine is closed"):
            call()


def test_an_unknown_keyword_is_named_with_the_nearest(model: Model) -> None:
    for call in (engine(model).generate, engine(model).stream):
        with pytest.raises(TypeError, match=r"'max_tokens' is not an option.*'max_new_tokens'"):
            call("a", max_tokens=3)  # type: ignore[call-arg]


def test_tasks_get_what_each_would_get_alone(model: Model) -> None:
    made = engine(model)
    alone = [made.generate(text, raw=True, max_new_tokens=12).text for text in TEXTS]

    async def streamed(text: str) -> str:
        return "".join([piece async for piece in made.astream(text, raw=True, max_new_tokens=12)])

    async def together() -> tuple[list[str], list[str]]:
        answers = await asyncio.gather(*(made.agenerate(text, raw=True, max_new_tokens=12) for text in TEXTS))
        return [answer.text for answer in answers], await asyncio.gather(*map(streamed, TEXTS))

    assert asyncio.run(together()) == (alone, alone)
    made.close()


def test_samples_are_forks_of_one_prompt(model: Model) -> None:
    made = engine(model)
    answers = made.sample(TEXTS[0] * 3, 3, raw=True, max_new_tokens=20, temperature=1.0)
    assert len({answer.text for answer in answers}) == 3
    assert [answer.usage["cached_tokens"] > 60 for answer in answers] == [False, True, True]
    with pytest.raises(UsageError, match="n is 0"):
        made.sample("a", 0)


class Town(BaseModel):
    name: str
    is_port: bool


def test_an_answer_becomes_an_object(model: Model) -> None:
    names = ["<pad>", "<s>", "</s>", *map(chr, range(32, 123)), "{", "}"]  # what JSON is spelled with
    made = engine(
        dataclasses.replace(model, vocabulary=Vocabulary(tokenizer_of(names), {"eos_token": "</s>"}, TEMPLATE))
    )
    answer = made.generate("a", raw=True, max_new_tokens=90, json_schema=Town, logit_bias={5: 9})  # a quote ends a name
    assert answer.finish_reason == "stop"
    assert answer.parsed == Town.model_validate_json(answer.text)
    cut = made.generate("a", raw=True, max_new_tokens=3, json_schema=Town)
    assert (cut.finish_reason, cut.parsed) == ("length", None)
    with pytest.raises(UsageError, match="int is no pydantic class"):
        engine(model).generate("a", json_schema=int)


def test_a_stream_that_is_left_is_taken_out(model: Model) -> None:
    made = engine(model)

    def first(text: str) -> Iterator[str]:
        stream = made.stream(text, raw=True, max_new_tokens=100)
        yield next(stream)
        stream.close()  # type: ignore[attr-defined]

    assert [*first(TEXTS[0])]
    made.generate(TEXTS[1], raw=True, max_new_tokens=3)
    assert not made._together._schedule


def test_what_fails_in_a_thread_is_its_own(model: Model, tmp_path: Path) -> None:
    made = engine(model)
    stream = made.stream(TEXTS[0], raw=True, max_new_tokens=30)
    next(stream)
    with pytest.raises(UsageError, match="0 or more"):
        made.generate(TEXTS[1], temperature=-1)
    assert len("".join(stream)) > 20
