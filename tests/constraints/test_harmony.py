"""gpt-oss's channels: thoughts, answers and calls told apart, and held to grammars and budgets."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from support.calls import RAIN, WEATHER
from support.engines import engine, every_drafter, finish, tiny
from support.letters import tokenizer_of
from tokenizers import AddedToken

from longspec.calls import FORMATS
from longspec.calls.toolbox import Toolbox
from longspec.engine.conversation import Conversation
from longspec.model.load import Model, end_tokens
from longspec.text.detokenizer import Transcript
from longspec.text.reasoning import Reader, Section
from longspec.text.tokenizer import Vocabulary

SPECIAL = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"]
TEMPLATE = """{% if tools %}{{ tools | length }}functions.{% endif %}{% for m in messages %}\
{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endfor %}\
{% if x %}<|channel|>analysis<|message|><|channel|>commentary {% endif %}\
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
LETTERS = 'abcdefghijklmnopqrstuvwxyzCFIWYRS0123456789 {}[]":,.?_=|<>/\\é-'


def vocabulary() -> Vocabulary:
    """Each letter is a token, and each of harmony's marks."""
    names = ["<pad>", "<s>", "</s>", *SPECIAL, *LETTERS]
    assert len(names) <= 96
    tokenizer = tokenizer_of(names)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return Vocabulary(tokenizer, {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|return|>"}, TEMPLATE)


def split(text: str, size: int = 1) -> tuple[str, str, list[tuple[str, Any]]]:
    """Thoughts, what is said, and the calls of an answer that comes token by token."""
    words = vocabulary()
    assert words.markers is not None
    prompt = words.encode("<|start|>assistant", add_special=False)
    reader = Reader(words, words.markers)
    section = Section(reader, words.markers, reader.begun(prompt))
    transcript, calls = Transcript(words), FORMATS["harmony"]
    of_calls = Toolbox.of(calls, [WEATHER, RAIN], "auto", True).reader()
    whole = thought = said = ""
    names: list[str] = []
    arguments: list[str] = []

    def show(*, over: bool) -> None:
        nonlocal thought, said
        first, second = section.parts(whole, over=over)
        second, parts = of_calls.take(second, over=over)
        thought, said = thought + first, said + second
        for part in parts:
            if part.name:
                names.append(part.name)
                arguments.append("")
            arguments[part.index] += part.arguments

    for i, token in enumerate(words.encode(text, add_special=False)):
        whole += transcript.push(token)
        section.take(token, transcript.begins[-1])
        if i % size == 0:
            show(over=False)
    whole += transcript.close()
    show(over=True)
    return thought, said, [(name, json.loads(each)) for name, each in zip(names, arguments, strict=True)]


FINAL, THINKS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>I see.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.rain <|constrain|>json<|message|>{"city": "a", "days": 2}'
BEFORE = ' to=functions.rain<|channel|>commentary json<|message|>{"city": "a", "days": 2}'
RAINS = [("rain", {"city": "a", "days": 2})]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"{THINKS}{FINAL}Yes, it is.", ("I see.", "Yes, it is.", [])),
        (f"{FINAL}Yes.", ("", "Yes.", [])),
        ("Yes.", ("", "Yes.", [])),
        (f"{THINKS}{CALL}", ("I see.", "", RAINS)),
        (f"{THINKS}{BEFORE}", ("I see.", "", RAINS)),
        (CALL, ("", "", RAINS)),
        (f"{THINKS}<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant{CALL}", ("I see.", "Wait.", RAINS)),
        (f"{CALL}<|end|><|start|>assistant{BEFORE}", ("", "", RAINS * 2)),
        ("<|channel|>analysis<|message|>I s", ("I s", "", [])),
        (f"{THINKS}<|channel|>fin", ("I see.", "<|channel|>fin", [])),
        (f"{FINAL}a < b <|x", ("", "a < b <|x", [])),
    ],
)
def test_channels_are_told_apart(text: str, wanted: tuple[str, str, Any], size: int) -> None:
    assert split(text, size) == wanted


def test_a_message_has_several_ends() -> None:
    words = vocabulary()
    ids = {name: words.tokenizer.token_to_id(name) for name in SPECIAL}
    assert ids["<|end|>"] not in words.turn_ends
    assert {ids["<|call|>"], ids["<|return|>"]} <= set(words.turn_ends)

    class Said:
        end_tokens = (ids["<|end|>"],)

    assert ids["<|end|>"] not in end_tokens(Said(), {"eos_token_id": [ids["<|end|>"]]}, words)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made, words = tiny(tmp_path_factory.mktemp("tiny")), vocabulary()
    return replace(made, vocabulary=words, end_tokens=words.turn_ends)


SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_new_tokens": 160, "reasoning_budget": 12}


@pytest.mark.parametrize("options", [{"regex": "[a-c]{4}"}, {"json_schema": {"type": "integer"}}], ids=str)
def test_an_answer_is_held_behind_its_thoughts(model: Model, options: dict[str, Any]) -> None:
    """The prompt opens them, and what leads to the answer is forced."""

    def opened(made: Any) -> list[Any]:
        return [made.open("ab", key="0", **options, **SAMPLED)]

    plain = opened(engine(model))
    wanted = finish(engine(model), plain)
    session = plain[0]
    assert session.text.count("<|end|><|start|>assistant<|channel|>final<|message|>") == 1
    assert session.reasoning is not None
    assert re.fullmatch("[a-c]{4}" if "regex" in options else r"-?\d+", session.said)
    for name, drafter in every_drafter({"0": wanted[0]}, "llama").items():
        made = engine(model, drafter())
        assert finish(made, opened(made)) == wanted, name


def test_a_call_is_held_behind_its_thoughts(model: Model) -> None:
    options: dict[str, Any] = {**SAMPLED, "tools": [WEATHER, RAIN], "tool_choice": "required", "max_new_tokens": 300}
    answer = engine(model, "ngram").generate("ab", **options)
    assert answer.text == ""
    assert answer.calls
    assert answer.calls[0].name in ("weather", "rain")


def test_a_conversation_keeps_what_was_said(model: Model) -> None:
    """The template writes the channel of an earlier answer, and no thoughts."""
    made = engine(model)
    conversation = Conversation(made, **SAMPLED, regex="[a-c]{4}")
    first = "".join(conversation.stream("ab"))
    said = first.rpartition(FINAL)[2]
    assert re.fullmatch("[a-c]{4}", said)
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    session = conversation.ask("b")
    words, written = (
        made.model.vocabulary,
        f"<|start|>user<|message|>ab<|end|><|start|>assistant<|message|>{said}<|end|>",
    )
    begun = f"{written}<|start|>user<|message|>b<|end|><|start|>assistant<|channel|>analysis<|message|>"
    assert session.tokens == words.encode(begun, add_special=False)


def test_a_budget_closes_the_channel(model: Model) -> None:
    answer = engine(model, "ngram").generate("ab", **SAMPLED, json_schema={"type": "boolean"})
    assert answer.usage["reasoning_tokens"] <= 12
    assert answer.text in ("true", "false")
