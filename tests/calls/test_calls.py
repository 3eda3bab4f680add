"""Formats of calls: what a family writes is read whole or in pieces, and what a grammar holds is read as calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from support.calls import WEATHER, box

from longspec.calls import FORMATS, find
from longspec.calls.toolbox import MOST_CALLS, MOST_NBYTES, MOST_TOOLS, Toolbox
from longspec.constraints.grammar import checked
from longspec.constraints.json_schema import prepared
from longspec.errors import UsageError

ARGUMENTS: list[dict[str, Any]] = [{"city": 'a]{"\\é', "days": 2}, {"city": "c", "days": 3, "unit": "C"}]


def json_calls(key: str) -> list[str]:
    return [
        json.dumps({"name": name, key: arguments}, ensure_ascii=False)
        for name, arguments in zip(("weather", "rain"), ARGUMENTS, strict=True)
    ]


def tags(name: str, arguments: dict[str, Any]) -> str:
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


def gemma(name: str, arguments: dict[str, Any]) -> str:
    parts = [
        f'{key}:<|"|>{value}<|"|>' if isinstance(value, str) else f"{key}:{value}" for key, value in arguments.items()
    ]
    return f"<|tool_call>call:{name}{{{','.join(parts)}}}<tool_call|>"


HERMES, LLAMA = json_calls("arguments"), json_calls("parameters")
WRITTEN = {
    "hermes": "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in HERMES),
    "qwen-xml": "\n".join([tags("weather", ARGUMENTS[0]), tags("rain", ARGUMENTS[1])]),
    "mistral": "".join(
        f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments, ensure_ascii=False)}"
        for name, arguments in zip(("weather", "rain"), ARGUMENTS, strict=True)
    ),
    "mistral-list": f"[TOOL_CALLS] [{', '.join(HERMES)}]",
    "llama": "; ".join(LLAMA),
    "gemma": gemma("weather", ARGUMENTS[0]) + gemma("rain", ARGUMENTS[1]),
    "harmony": "<|end|><|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        + json.dumps(arguments, ensure_ascii=False)
        for name, arguments in zip(("weather", "rain"), ARGUMENTS, strict=True)
    ),
}
TEMPLATES = {
    "hermes": "{{ tools }}<tool_call>",
    "qwen-xml": "{{ tools }}<tool_call><function=",
    "mistral": "{{ tools }}[TOOL_CALLS][ARGS]",
    "mistral-list": "{{ tools }}[TOOL_CALLS]",
    "llama": '{{ tools }}ipython "parameters"',
    "gemma": "{{ tools }}<|tool_call>call:",
    "harmony": "{{ tools }}functions.<|channel|>commentary ",
}


def read(toolbox: Toolbox, text: str, size: int) -> tuple[str, list[tuple[str, Any]]]:
    """What is said, and the calls with their arguments, of a text that comes in pieces."""
    reader, said = toolbox.reader(), ""
    names: list[str] = []
    arguments: list[str] = []
    for at in range(0, len(text) + 1, size):
        more, parts = reader.take(text[at : at + size], over=at + size > len(text))
        said += more
        for part in parts:
            if part.name:
                assert part.index == len(names)
                names.append(part.name)
                arguments.append("")
            arguments[part.index] += part.arguments
    return said, [(name, json.loads(each)) for name, each in zip(names, arguments, strict=True)]


@pytest.mark.parametrize("size", [1, 5, 10_000])
@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_read_as_they_come(name: str, size: int) -> None:
    wanted = list(zip(("weather", "rain"), ARGUMENTS, strict=True))
    assert read(box(name), WRITTEN[name], size) == ("", wanted)
    said = "" if FORMATS[name].alone else "Let me see:"
    assert read(box(name), f"{said}\n{WRITTEN[name]}", size) == (said, wanted)


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", ["", "no call ", " <tool [TOOL_ <|python", '{"a": 1}', "x\n\n", "{", "a <b> [c]\n d"])
def test_what_is_no_call_is_text(name: str, size: int, text: str) -> None:
    assert read(box(name), text, size) == (text, [])


@pytest.mark.parametrize("size", [1, 10_000])
def test_calls_that_are_written_otherwise(size: int) -> None:
    backwards = '<tool_call>\n{"arguments": {"city": "c"}, "name": "rain"}\n</tool_call> and'
    assert read(box("hermes"), backwards, size) == ("and", [("rain", {"city": "c"})])
    quoted = '<tool_call>{"name": "rain", "arguments": "{\\"city\\": 1}"}</tool_call>'
    assert read(box("hermes"), quoted, size) == ("", [("rain", {"city": 1})])
    bad = "<tool_call>\nrain, please\n</tool_call> then"
    assert read(box("hermes"), bad, size) == (bad, [])
    tagged = '<|python_tag|>{"name": "rain", "parameters": {}}'
    assert read(box("llama"), tagged, size) == ("", [("rain", {})])
    unknown = '{"name": "snow", "parameters": {}}'
    assert read(box("llama"), unknown, size) == (unknown, [])
    named = '[TOOL_CALLS]rain[CALL_ID]abcdefghi[ARGS]{"city": "c"}'
    assert read(box("mistral"), named, size) == ("", [("rain", {"city": "c"})])
    empty = "<tool_call>\n<function=rain>\n</function>\n</tool_call>"
    assert read(box("qwen-xml"), empty, size) == ("", [("rain", {})])


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_call_keeps_what_was_written(name: str) -> None:
    reader = box(name).reader()
    cut = WRITTEN[name].index("days")
    _, parts = reader.take(WRITTEN[name][:cut], over=True)
    assert parts[0].name == "weather"
    assert "".join(part.arguments for part in parts).startswith('{"city": "a]{')


@pytest.mark.parametrize("name", FORMATS)
def test_a_template_says_the_format(name: str) -> None:
    assert find(TEMPLATES[name]) is FORMATS[name]
    assert find(TEMPLATES[name].replace("tools", "x")) is None
    assert find("{{ tools }}") is None


# --- grammars


class Bytes:
    """A vocabulary of bytes."""

    tokens = [*(bytes([i]) for i in range(256)), b"<eos>"]  # noqa: RUF012  as llguidance reads it
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = [256]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return [*text]


TOKENIZER = LLTokenizer(TokenizerWrapper(Bytes()))


def is_held(grammar: str | None, text: str) -> bool:
    """Whether the grammar lets the whole text through, and its end."""
    assert grammar is not None
    matcher = LLMatcher(TOKENIZER, checked(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = [*text.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("name", FORMATS)
def test_calls_that_must_be_are_held(name: str) -> None:
    both = WRITTEN[name]
    assert is_held(box(name, "required").grammar(prepared), both)
    assert not is_held(box(name, "required", parallel=False).grammar(prepared), both)
    for text in ("", "hello", "hi " + both, both.replace("days", "dais"), both.replace("weather", "snow")):
        assert not is_held(box(name, "required").grammar(prepared), text)
    assert not is_held(box(name, "rain").grammar(prepared), both)
    assert box(name, "auto").grammar(prepared) is None


@pytest.mark.parametrize("name", FORMATS)
def test_strict_tools_are_held_where_they_are_called(name: str) -> None:
    grammar = box(name, "auto", strict=True).grammar(prepared)
    both = WRITTEN[name]
    for text in ("", "hello", "a < b, [c] \n d", both):
        assert is_held(grammar, text)
    assert is_held(grammar, f"Let me see.\n{both}")
    assert not is_held(grammar, both.replace("days", "dais"))


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_is_held_beside_calls(name: str) -> None:
    answer = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = box(name, "auto").grammar(prepared, answer)
    assert is_held(grammar, f'{FORMATS[name].lead}{{"a": 1}}')
    assert is_held(grammar, WRITTEN[name])
    assert not is_held(grammar, "hello")


@pytest.mark.parametrize("name", FORMATS)
def test_schemas_of_parameters_hold_their_values(name: str) -> None:
    grammar = box(name, "weather").grammar(prepared)
    one = read(box(name), WRITTEN[name], 10_000)[1][0]
    assert one[0] == "weather"
    first = WRITTEN[name].split("rain")[0]
    assert not is_held(grammar, first.replace("2", "two"))


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        ([{"type": "web_search"}], "auto", "tools[0] isn't a function"),
        ([{"function": {"name": "a b"}}], "auto", "tools[0].function.name is 'a b'"),
        ([{"function": {"name": "auto"}}], "auto", "which tool_choice means otherwise"),
        ([{"function": {"name": "a", "parameters": []}}], "auto", "isn't a JSON schema"),
        ([WEATHER, WEATHER], "auto", "Two tools are named"),
        ([WEATHER], "snow", "tool_choice is 'snow'"),
        ([WEATHER] * (MOST_TOOLS + 1), "auto", f"{MOST_TOOLS + 1} tools are given"),
        ([{"function": {"name": "a", "description": "x" * MOST_NBYTES}}], "auto", "they may have 262,144"),
    ],
)
def test_tools_that_are_none(tools: list[dict[str, Any]], choice: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        Toolbox.of(FORMATS["hermes"], tools, choice, parallel=True)
    assert said in str(refused.value)


def test_a_model_without_a_format_takes_no_tools() -> None:
    with pytest.raises(UsageError, match="takes no tools"):
        Toolbox.of(None, [WEATHER], "auto", parallel=True)


def test_no_answer_has_calls_without_end() -> None:
    one = WRITTEN["hermes"].split("\n<tool_call>")[0]
    grammar = box("hermes", "required").grammar(prepared)
    assert is_held(grammar, "\n".join([one] * MOST_CALLS))
    assert not is_held(grammar, "\n".join([one] * (MOST_CALLS + 1)))
