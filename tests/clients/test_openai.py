"""OpenAI's own client, as agents use it: tools, objects, thoughts, and the Responses API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.agents import TOWN, Town, tool
from support.servers import Served

USER: Any = [{"role": "user", "content": "Where to?"}]
TOOLS: Any = [tool("weather"), tool("rain")]
ASKED: Any = {"model": "tiny", "messages": USER, "temperature": 1.0, "seed": 4, "max_tokens": 900}
BROKEN = {"id": "a", "function": {"name": "a", "arguments": "["}}
PLAIN = {"longspec": {"drafter": "none"}}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as made:
        yield made


def town(arguments: str) -> Town:
    return Town.model_validate_json(arguments)


# --- tools


def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI) -> None:
    for seed in range(2):
        asked: Any = {**ASKED, "tools": TOOLS, "tool_choice": "required", "seed": seed}
        [choice] = client.chat.completions.create(**asked).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        calls: Any = choice.message.tool_calls
        assert 1 <= len(calls) <= 16
        assert len({call.id for call in calls}) == len(calls)
        for call in calls:
            assert call.function.name in ("weather", "rain")
            town(call.function.arguments)
        plain: Any = client.chat.completions.create(**asked, extra_body=PLAIN).choices[0]
        assert [call.function for call in plain.message.tool_calls] == [call.function for call in calls]
        assert plain.longspec["speculation"]["drafted"] == 0


def test_a_named_tool_is_called_once(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "rain"}}
    asked: Any = {**ASKED, "tools": TOOLS, "tool_choice": named}
    [call] = client.chat.completions.create(**asked).choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "rain"
    one: Any = {**ASKED, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    assert len(client.chat.completions.create(**one).choices[0].message.tool_calls or []) == 1


def test_calls_are_streamed(client: openai.OpenAI) -> None:
    asked: Any = {**ASKED, "tools": TOOLS, "tool_choice": "required"}
    whole: Any = client.chat.completions.create(**asked).choices[0].message.tool_calls
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    chunks: Any = list(client.chat.completions.create(**asked, stream=True))
    for part in [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]:
        if part.id:
            names[part.index] = part.function.name
        arguments[part.index] = arguments.get(part.index, "") + part.function.arguments
    assert [*names.values()] == [call.function.name for call in whole]
    assert [*arguments.values()] == [call.function.arguments for call in whole]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_history_with_calls_is_read(served: Served, client: openai.OpenAI) -> None:
    call = {"id": "abc", "type": "function", "function": {"name": "rain", "arguments": '{"city": "Bonn"}'}}
    history: Any = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "wet"},
    ]
    told: Any = [
        *USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "rain", "arguments": {"city": "Bonn"}}}],
        },
        {"role": "tool", "content": "wet"},
    ]
    own: Any = {"max_new_tokens": 9, "tools": TOOLS}
    answer = client.chat.completions.create(model="tiny", messages=history, tools=TOOLS, max_tokens=9)
    assert answer.choices[0].message.content == served.engine.generate(told, **own).text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function is missing"),
        ({"tools": [{"type": "web_search"}]}, 'tools[0].type is "web_search"; it must be function.'),
        ({"tools": [tool("a b")]}, "tools[0].function.name is 'a b'"),
        ({"tools": TOOLS, "tool_choice": {"type": "x"}}, "tool_choice is"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "snow"}}}, "tool_choice is 'snow'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS * 65}, "tools has 130; it may have 128"),
        ({"messages": [*USER, {"role": "tool", "content": "A"}]}, "messages[1].tool_call_id is missing"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "a", "arguments": "["}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments isn't an object in JSON",
        ),
        ({"messages": USER * 5000}, "messages has 5,000; it may have 4,096"),
        ({"response_format": {"type": "yaml"}}, 'response_format.type is "yaml"'),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}}, "can't be used"),
        ({"longspec": {"drafter": "model"}}, "There is no drafter 'model' here; use none or ngram."),
        ({"reasoning_effort": "extreme"}, "The effort 'extreme' is not known"),
    ],
)
def test_what_is_refused(served: Served, body: dict[str, Any], said: str) -> None:
    status, answer = served.ask({"messages": USER, "max_tokens": 2, **body}, "/v1/chat/completions")
    assert status == 400
    assert said in answer["error"]["message"]


# --- log-probabilities, penalties and biases


def test_logprobs_are_those_of_plain_decoding(client: openai.OpenAI) -> None:
    asked: Any = {**ASKED, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    drafted, plain = (client.chat.completions.create(**asked, extra_body=extra).choices[0] for extra in ({}, PLAIN))
    told: Any = [choice.logprobs.content for choice in (drafted, plain) if choice.logprobs]
    assert [one.token for one in told[0]] == [one.token for one in told[1]]
    assert [one.logprob for one in told[0]] == pytest.approx([one.logprob for one in told[1]], abs=1e-4)
    assert all(len(one.top_logprobs) == 3 for one in told[0])
    assert "".join(one.token for one in told[0]).strip() == (drafted.message.content or "").strip()
    chunks: Any = list(client.chat.completions.create(**asked, stream=True))
    parts = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert [one.token for part in parts for one in part] == [one.token for one in told[0]]
    one: Any = client.completions.create(model="tiny", prompt="ABC", max_tokens=3, logprobs=2).choices[0].logprobs
    assert (len(one.tokens), len(one.top_logprobs[0])) == (len(one.token_logprobs), 2)


def test_penalties_and_biases_are_the_engines(served: Served, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": USER, "max_tokens": 12, "seed": 1, "temperature": 1.0}
    asked |= {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {"40": 5, "41": -100}}
    own: Any = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {40: 5, 41: -100}}
    alone = served.engine.generate(USER, max_new_tokens=12, seed=1, temperature=1.0, **own)
    assert client.chat.completions.create(**asked).choices[0].message.content == alone.text


# --- objects and thoughts


def test_an_answer_is_an_object(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(**ASKED, response_format=Town).choices[0].message.parsed
    assert isinstance(parsed, Town)
    asked: Any = {**ASKED, "max_tokens": 3, "response_format": {"type": "json_object"}}
    assert (client.chat.completions.create(**asked).choices[0].message.content or "").startswith("{")


def test_a_schema_beside_json_object_counts(served: Served) -> None:
    for kind in ("json_object", "json_schema"):
        body = {**ASKED, "response_format": {"type": kind, "schema": Town.model_json_schema()}}
        status, answer = served.ask(body, "/v1/chat/completions")
        assert status == 200
        assert town(answer["choices"][0]["message"]["content"])


def test_thoughts_come_before_the_object(client: openai.OpenAI) -> None:
    thinking: Any = {"reasoning_effort": "high", "extra_body": {"reasoning_budget": 5}}
    message: Any = client.chat.completions.parse(**ASKED, **thinking, response_format=Town).choices[0].message
    assert isinstance(message.parsed, Town)
    assert message.reasoning_content
    asked: Any = {**ASKED, **thinking, "tools": TOOLS, "tool_choice": "required"}
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.reasoning_content
    assert message.tool_calls


# --- the Responses API


def test_a_response_and_its_events(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "Where to?", "instructions": "Short.", "max_output_tokens": 20}
    whole = client.responses.create(**asked)
    assert (whole.status, whole.output_text != "") == ("incomplete", True)
    chat: Any = [{"role": "system", "content": "Short."}, *USER]
    same = client.chat.completions.create(model="tiny", messages=chat, max_tokens=20)
    assert whole.output_text == same.choices[0].message.content
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text
    kinds = [event.type for event in client.responses.create(**asked, stream=True)]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_a_response_that_thinks_and_calls(client: openai.OpenAI) -> None:
    tools: Any = [
        {"type": "function", "name": name, "parameters": TOWN, "strict": True} for name in ("weather", "rain")
    ]
    asked: Any = {"model": "tiny", "input": "Where to?", "tools": tools, "tool_choice": "required", "temperature": 1.0}
    asked |= {"reasoning": {"effort": "high"}, "extra_body": {"reasoning_budget": 5, "seed": 4}}
    whole: Any = client.responses.create(**asked)
    assert whole.status == "completed"
    assert whole.output[0].type == "reasoning"
    calls = [item for item in whole.output if item.type == "function_call"]
    assert [town(call.arguments) for call in calls]
    events: Any = list(client.responses.create(**asked, stream=True))
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.type for item in done] == [item.type for item in whole.output]
    assert [item.arguments for item in done[1:]] == [call.arguments for call in calls]
    assert events[-1].type == "response.completed"
    assert [event.sequence_number for event in events] == [*range(len(events))]
    items = [item.model_dump(exclude_none=True) for item in whole.output]
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "wet"} for call in calls]
    again: Any = [{"role": "user", "content": "Where to?"}, *items, *outputs]
    assert client.responses.create(model="tiny", input=again, tools=tools, max_output_tokens=4).output


def test_a_response_is_an_object(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "Where to?", "text_format": Town}
    assert isinstance(client.responses.parse(**asked).output_parsed, Town)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "input is null"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type is"),
        ({"input": "A", "previous_response_id": "resp_1"}, "previous_response_id isn't supported"),
        ({"input": "A", "background": True}, "background isn't supported"),
        ({"input": "A", "tools": [{"type": "web_search"}]}, "only functions are supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type is"),
    ],
)
def test_responses_that_are_refused(served: Served, body: dict[str, Any], said: str) -> None:
    status, answer = served.ask(body, "/v1/responses")
    assert status == 400
    assert said in answer["error"]["message"]


def test_arguments_are_what_the_engine_wrote(served: Served) -> None:
    own: Any = {"tools": TOOLS, "tool_choice": "required", "temperature": 1.0, "seed": 4}
    answer = served.engine.generate(USER, **own)
    assert answer.text == ""
    assert answer.calls
    assert all(json.loads(call.arguments) for call in answer.calls)
