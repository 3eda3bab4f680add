"""What a program gives that isn't what was declared: an error that says so, before anything runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import write_tiny
from support.engines import RandomTrees, engine, prompts, tiny
from support.letters import TEMPLATE, tokenizer_of
from torch import Tensor

from longspec.engine.answer import Answer
from longspec.engine.engine import Engine
from longspec.errors import LongspecError, UsageError
from longspec.model.load import Model
from longspec.text.tokenizer import Vocabulary

TEXT = prompts(1, 60)[0]
LOAD: Callable[..., Engine] = Engine.load
WANTED = r"numbers of the shape \[r, V\]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("drafter", ["none", "ngram"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 4.5}, "max_new_tokens is 4.5; it must be a whole number, 1 or more"),
        ({"max_new_tokens": 4.0}, "max_new_tokens is 4.0; it must be a whole number, 1 or more"),
        ({"max_new_tokens": "4"}, "max_new_tokens is '4'; it must be a whole number, 1 or more"),
        ({"max_new_tokens": True}, "max_new_tokens is True; it must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": "1"}, "seed is '1'; it must be a whole number"),
        ({"temperature": "a"}, "temperature is 'a'; it must be a number, 0 or more and at most 2"),
        ({"temperature": float("nan")}, "temperature is nan; it must be 0 or more and at most 2"),
        ({"top_k": 4.5, "temperature": 1}, "top_k is 4.5; it must be a whole number"),
        ({"logprobs": "x"}, "logprobs is 'x'; it must be a whole number, 0 to 20"),
        ({"reasoning_budget": 1.5}, "reasoning_budget is 1.5; it must be a whole number"),
        ({"raw": "yes"}, "raw is 'yes'; it must be True or False"),
        ({"stop_loops": "x"}, "stop_loops is 'x'; it must be True or False"),
        ({"stop": 3}, "stop is 3; it must be a text or a list of texts"),
        ({"stop": [1]}, r"stop is \[1\]; it must be a text or a list of texts"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]; it must be a dict"),
        ({"regex": 3}, "regex is 3; it must be a text"),
        ({"json_schema": 3}, "json_schema is 3; it must be a text, a path, a dict or a class"),
        ({"json_schema": []}, r"json_schema is \[\]; it must be a text, a path, a dict or a class"),
        ({"tools": "x"}, "tools is 'x'; it must be a list of dicts"),
        ({"processors": [3]}, r"processors is \[3\]; it must be a list of functions"),
        ({"processors": len}, "processors is .*; it must be a list of functions"),
        ({"drafter": 3}, "drafter is 3; it must be a text"),
        ({"key": 4}, "key is 4; it must be a text"),
        ({"after": "x"}, "after is 'x'; it must be a Session"),
    ],
    ids=str,
)
def test_an_option_is_what_it_is_declared_to_be(model: Model, drafter: str, options: dict[str, Any], said: str) -> None:
    made = engine(model, drafter)
    for call in (made.generate, made.stream):
        with pytest.raises(UsageError, match=said):
            call("Aa" * 20, **options)
    with pytest.raises(UsageError, match=said):
        asyncio.run(made.agenerate("A", **options))
    with pytest.raises(UsageError, match=said):
        made.generate_many(["A"], **options)
    [(_, error)] = made.generate_many([("A", options)])  # type: ignore[list-item]
    assert isinstance(error, UsageError)


def test_what_is_left_out_may_be_none(model: Model) -> None:
    made = engine(model)
    plain = made.generate("A", max_new_tokens=3)
    assert made.generate("A", max_new_tokens=3, stop=None, raw=None, key=None, seed=None).tokens == plain.tokens  # type: ignore[arg-type]
    assert made.generate("A", max_new_tokens=3, stop=("~",), temperature=0).tokens == plain.tokens


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (3, "The prompt is 3; it must be a text, or a list of messages"),
        (None, "The prompt is None; it must be a text"),
        (b"hi", "The prompt is b'hi'; it must be a text"),
        (["a", "b"], r"The prompt is \['a', 'b'\]; it must be a text"),
        ({"role": "user", "content": "a"}, "it must be a text, or a list of messages"),
        ("", "The prompt is empty; give a text"),
        (" \n", "The prompt is empty; give a text"),
        ([], "The prompt has no message; give one"),
        ([{"role": "frog", "content": "a"}], "role is 'frog'; it must be user, system, assistant, tool or developer"),
        ([{"content": "a"}], "role is None; it must be user"),
        ([{"role": "user", "content": 3}], "content is 3; it must be a text or a list of dicts"),
    ],
    ids=str,
)
def test_a_prompt_is_a_text_or_messages(model: Model, prompt: Any, said: str) -> None:
    made = engine(model)
    with pytest.raises(UsageError, match=said):
        made.generate(prompt)
    with pytest.raises(UsageError, match=said):
        next(made.stream(prompt))
    found = dict(made.generate_many(["A", prompt], max_new_tokens=2))
    assert isinstance(found[0], Answer)
    assert isinstance(found[1], UsageError)


def test_a_template_may_name_further_roles(model: Model) -> None:
    names = ["<pad>", "<s>", "</s>", *(chr(48 + i) for i in range(model.decoder.config.vocabulary - 3))]
    template = TEMPLATE + "{% if messages[0].role == 'frog' %}q{% endif %}"
    told = replace(model, vocabulary=Vocabulary(tokenizer_of(names), {"eos_token": "</s>"}, template))
    assert engine(told).open([{"role": "frog", "content": "a"}]).prompt_length == 4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda made: made.score([3]), r"texts is \[3\]; it must be a list of texts"),
        (lambda made: made.score("ab"), "texts is 'ab'; it must be a list of texts"),
        (lambda made: made.score(["ab"], prompt=3), "prompt is 3; it must be a text or a list of dicts"),
        (lambda made: made.generate_many("ab"), "prompts is 'ab'; it must be a list"),
        (lambda made: made.generate_many(3), "prompts is 3; it must be a list"),
        (lambda made: made.generate_many(["ab"], width=1.5), "width is 1.5; it must be a whole number"),
        (lambda made: made.sample("ab", "2"), "n is '2'; it must be a whole number"),
        (lambda made: LOAD(drafter=3), "drafter is 3; it must be a text or a Drafter"),
        (lambda made: LOAD(threads="two"), "threads is 'two'; it must be a whole number from 1"),
        (lambda made: LOAD(threads=0), "threads is 0; it must be a whole number from 1"),
        (lambda made: LOAD(tokens="x"), "tokens is 'x'; it must be a whole number or a function"),
        (lambda made: LOAD(3), "model is 3; it must be a text, a path or a Module"),
        (lambda made: LOAD(draft_from="x"), "draft_from is 'x'; it must be a list of texts or paths"),
        (lambda made: LOAD(""), "The model's name is empty; give a short name"),
    ],
)
def test_an_argument_is_what_it_is_declared_to_be(model: Model, call: Callable[[Engine], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call(engine(model))


def test_loading_names_the_nearest_keyword() -> None:
    with pytest.raises(TypeError, match=r"'draftr' is not an option of Engine.load; did you mean 'drafter'\?"):
        LOAD(draftr="none")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda made: made.generate_many(["A"], widht=2), r"of Engine.generate_many; did you mean 'width'\?"),
        (lambda made: made.generate_many(["A"], max_tokens=2), r"generate_many; did you mean 'max_new_tokens'\?"),
        (lambda made: made.sample("A", N=2), r"'N' is not an option of Engine.sample; did you mean 'n'\?"),
        (lambda made: made.sample("A", number=2), r"of Engine.sample; there are: prompt, n, "),
        (lambda made: made.sample("A", 2, temprature=1), r"of Engine.sample; did you mean 'temperature'\?"),
        (lambda made: made.score(["AB"], promt="A"), r"of Engine.score; did you mean 'prompt'\?"),
    ],
)
def test_a_call_names_the_nearest_keyword(model: Model, call: Callable[[Engine], Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        call(engine(model))


def test_a_raw_prompt_without_a_token_is_refused(model: Model) -> None:
    """Where the tokenizer begins no text by itself."""
    bare = replace(model, vocabulary=Vocabulary(tokenizer_of([chr(i) for i in range(32, 127)]), {}, TEMPLATE))
    with pytest.raises(UsageError, match="The prompt is empty, and this model begins no text with a token of its own"):
        engine(bare).generate("", raw=True)


def from_third(value: float) -> Callable[[Tensor, Sequence[Sequence[int]]], Tensor]:
    """A processor that gives this value only, in rows behind three tokens of the answer or more."""

    def filled(logits: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
        late = torch.tensor([len(answer) >= 3 for answer in answers])
        return logits.masked_fill(late[:, None], value)

    return filled


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "seed": 4, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize(
    ("processor", "said"),
    [
        (from_third(float("nan")), f"tokens of prompt and answer: The processor filled returned nan .* {WANTED}"),
        (from_third(float("-inf")), f"The processor filled returned -inf only in a row; it must be {WANTED}"),
        (from_third(float("inf")), f"The processor filled returned inf in a row; it must be {WANTED}"),
        (lambda logits, answers: logits[:, :-1], f"The processor <lambda> returned torch.float32 .* {WANTED}"),
        (lambda logits, answers: logits[0], f"The processor <lambda> returned torch.float32 .* {WANTED}"),
        (lambda logits, answers: None, f"The processor <lambda> returned None .* {WANTED}"),
        (lambda logits, answers: logits.argsort(), f"The processor <lambda> returned torch.int64 .* {WANTED}"),
    ],
    ids=["nan", "-inf", "inf", "narrow", "flat", "none", "whole"],
)
def test_a_processors_fault_is_that_texts_error(
    model: Model, processor: Any, said: str, drafted: bool, sampled: dict[str, Any]
) -> None:
    plain: dict[str, Any] = {"raw": True, "max_new_tokens": 20, **sampled}
    right = [*engine(model).open(TEXT, raw=True).tokens, *engine(model).generate(TEXT, **plain).tokens]
    made = engine(model, RandomTrees({"": right, "1": right})) if drafted else engine(model)
    with pytest.raises(UsageError, match=said):
        made.generate(TEXT, processors=[processor], **plain)
    asked: list[Any] = [TEXT, (TEXT, {"processors": [processor]}), TEXT]
    found = dict(made.generate_many(asked, **plain))
    assert isinstance(found[1], LongspecError)
    for number in (0, 2):
        answer = found[number]
        assert isinstance(answer, Answer)
        assert answer.tokens == made.generate(TEXT, key=str(number), **plain).tokens


class OwnError(Exception):
    """What a caller's processor may raise."""


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "seed": 4}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
def test_a_processors_own_exception_comes_through(model: Model, drafted: bool, sampled: dict[str, Any]) -> None:
    """At its place in the text, with a note of it; the engine goes on, and so do the texts beside it."""

    def raising(logits: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
        if any(len(answer) >= 3 for answer in answers):
            raise OwnError("not this one")
        return logits

    plain: dict[str, Any] = {"raw": True, "max_new_tokens": 20, **sampled}
    prompt, text = engine(model).open(TEXT, raw=True).tokens, engine(model).generate(TEXT, **plain)
    made = engine(model, RandomTrees({"": [*prompt, *text.tokens]})) if drafted else engine(model)
    for call in (made.generate, lambda *asked, **options: [*made.stream(*asked, **options)]):
        with pytest.raises(OwnError, match="not this one") as caught:
            call(TEXT, processors=[raising], **plain)
        at = f"After {len(prompt) + 3:,} tokens of prompt and answer of the text, in a logits processor."
        assert caught.value.__notes__ == [at]
    asked: list[Any] = [TEXT, (TEXT, {"processors": [raising]}), TEXT]
    found = dict(made.generate_many(asked, **plain))
    assert isinstance(error := found[1], LongspecError)
    assert isinstance(error.__cause__, OwnError)
    assert "of the text with the key '1'" in error.__cause__.__notes__[0]
    for number in (0, 2):
        assert found[number].tokens == made.generate(TEXT, key=str(number), **plain).tokens  # type: ignore[union-attr]
    assert made.generate(TEXT, **plain).tokens == text.tokens


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "seed": 4}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("raises", [False, True])
def test_a_fault_that_plain_decoding_never_meets_is_none(model: Model, sampled: dict[str, Any], raises: bool) -> None:
    """Rows of drafts that aren't the text, and the row behind its end."""
    plain: dict[str, Any] = {"raw": True, "max_new_tokens": 30, "stop": None, **sampled}
    text = engine(model).generate(TEXT, **plain)
    plain["stop"] = text.text[20:22]
    wanted = engine(model).generate(TEXT, **plain)

    def off_the_text(logits: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
        """Faulty behind everything but what the text is before its end."""
        ways = [text.tokens[: len(wanted.tokens) + 1][: len(answer)] == tuple(answer) for answer in answers]
        if raises and not all(ways):
            raise OwnError
        return logits.masked_fill(~torch.tensor(ways)[:, None], float("nan"))

    prompt = engine(model).open(TEXT, raw=True).tokens
    made = engine(model, RandomTrees({"": [*prompt, *text.tokens]}))
    answer = made.generate(TEXT, processors=[off_the_text], **plain)
    assert (answer.tokens, answer.text) == (wanted.tokens, wanted.text)
    assert answer.speculation["accepted"] > 5


def test_a_model_may_be_a_path(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    assert Engine.load(Path(folder)).generate("A", max_new_tokens=2).tokens
