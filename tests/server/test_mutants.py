"""Mutants of requests and of a batch's records: each is answered, or refused with a sentence; nothing else happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from random import Random
from typing import Any

import pytest
from support.commands import SECONDS
from support.engines import engine, tiny
from support.mutants import VALUES, of_bytes, of_json

from longspec.batch.inputs import _objects, _openai
from longspec.batch.job import Job, Result
from longspec.batch.lines import read_lines
from longspec.batch.records import line
from longspec.batch.requests import Fault
from longspec.engine.engine import Engine
from longspec.server.api import open_to_clients
from longspec.server.desk import Desk
from longspec.server.models import Models
from longspec.server.worker import Worker

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "ABC"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "B"},
    ],
    "max_completion_tokens": 3,
    "temperature": 0.7,
    "stream": True,
    "stream_options": {"include_usage": True},
}
AGENT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "A"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "B"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    "parallel_tool_calls": False,
    "longspec": {"drafter": "none"},
    "max_tokens": 3,
}
RESPONSE: dict[str, Any] = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "A"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "A"}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "B"},
    ],
    "tool_choice": "auto",
    "text": {"format": {"type": "json_object"}},
    "max_output_tokens": 3,
    "stream": True,
}
MESSAGE: dict[str, Any] = {
    "system": [{"type": "text", "text": "A"}],
    "messages": [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "B"}]},
    ],
    "max_tokens": 3,
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "disabled"},
    "stream": True,
}
COMPLETION: dict[str, Any] = {"prompt": ["ABC", "D"], "n": 2, "max_tokens": 3, "stop": ["A"], "seed": 1, "top_p": 0.5}
LINE = {"id": "a", "prompt": "ABC", "max_new_tokens": 3, "system": "B"}
TALK = {"id": 7, "messages": CHAT["messages"], "max_new_tokens": 3, "temperature": 1, "top_k": 3}
REQUEST = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": CHAT["messages"], "max_tokens": 3},
}
NAMES = [
    *["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "n", "stop", "stream", "stream_options"],
    *["max_tokens", "max_completion_tokens", "max_new_tokens", "stop_loops", "reasoning_effort", "reasoning_budget"],
    *["prompt", "messages", "model", "logprobs", "tools", "response_format", "system", "raw", "effort", "id", "tokens"],
]
PATHS = {b'"prompt"': "/v1/completions", b'"input"': "/v1/responses", b'"system": [': "/v1/messages"}
COUNTS = [100, pytest.param(2000, marks=pytest.mark.full)]


def mutants(good: Sequence[Any], count: int, seed: str) -> Iterator[bytes]:
    """Good requests with values, names and shapes changed, fields added, and one of five torn as bytes."""
    random = Random(seed)
    for _ in range(count):
        value = of_json(random.choice(good), random)
        if isinstance(value, dict) and random.random() < 0.5:
            value[random.choice(NAMES)] = random.choice(VALUES)()
        data = json.dumps(value).encode()
        yield of_bytes(data, random) if random.random() < 0.2 else data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine(tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=256), "ngram")


@pytest.fixture(scope="module")
def worker(made: Engine) -> Iterator[Worker]:
    up = Worker(lambda: made, 8)
    up.loaded.result(SECONDS)
    yield up
    up.stop(SECONDS)


async def ask(app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to a request, without a socket."""
    coming, sent, gone = [{"type": "http.request", "body": body}], list[Any](), asyncio.Event()

    async def receive() -> Any:
        if coming:
            return coming.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": headers,
        "query_string": b"",
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("count", COUNTS)
def test_every_request_is_answered_or_refused(worker: Worker, count: int, pytestconfig: pytest.Config) -> None:
    complaints: list[str] = []

    async def run() -> list[int]:
        desk = Desk(8, SECONDS)
        models = Models(desk, {"tiny": lambda _: worker})
        app, statuses = open_to_clients(desk, models, None, None, complaints.append), list[int]()
        good = [CHAT, COMPLETION, RESPONSE, MESSAGE, AGENT]
        asked = [*(json.dumps(each).encode() for each in good), *mutants(good, count, pytestconfig.option.seed)]
        for number, body in enumerate(asked):
            path = next((path for name, path in PATHS.items() if name in body and number % 9), "/v1/chat/completions")
            status, answer = await ask(app, path, body)
            statuses.append(status)
            assert status == 200 or 400 <= status < 500, (body, answer)
            if status != 200:
                said = json.loads(answer)["error"]["message"]
                assert said.endswith((".", "...")), said
            assert b'"server_error"' not in answer
            assert len(desk) == 0
        return statuses

    statuses = asyncio.run(run())
    assert complaints == []
    assert {200, 400} <= set(statuses)
    assert len(worker) == 0


@pytest.mark.parametrize("count", COUNTS)
def test_every_record_has_its_line(made: Engine, count: int, pytestconfig: pytest.Config) -> None:
    """A failed record is its own line, and those beside it are written."""
    for read, good in ((_objects, [LINE, TALK]), (_openai, [REQUEST])):
        records = [json.dumps(each).encode() for each in good]
        records += [data.replace(b"\n", b" ") for data in mutants(good, count // 2, pytestconfig.option.seed)]
        whole = b"\n".join(records)
        wanted = sum(not each.is_blank for each in read_lines(BytesIO(whole)))
        job = Job(made, read(read_lines(BytesIO(whole)), None), {"max_new_tokens": 3})
        results: list[Result] = []
        while job.admitting or job.running:
            results += [*job.admit(), *job.step()]
        assert sorted(result.index for result in results) == list(range(wanted))
        assert all(json.loads(line(result, openai=read is _openai)) for result in results)
        failed = [result for result in results if isinstance(result, Fault)]
        assert 0 < len(failed) < wanted
        assert [each.reason for each in failed if not each.reason.strip()] == []


@pytest.mark.parametrize(
    ("wrong", "fails"),
    [
        ({"prompt": ["a"]}, True),
        ({"messages": [{"role": "user", "content": "A", "name": {"b": [1]}}], "prompt": None, "stop": [1]}, True),
        ({"prompt": "A", "temperature": 1e400}, True),
        # What isn't a list of the answer's tokens is a field like any other.
        *(
            ({"messages": [{"role": "assistant", "content": "A", "tokens": tokens}]}, False)
            for tokens in ({"a": 1}, ["x", None], [1 << 70], 5)
        ),
    ],
)
def test_a_record_of_wrong_types_concerns_no_other(made: Engine, wrong: dict[str, Any], fails: bool) -> None:
    lines = b"\n".join(json.dumps(each).encode() for each in (LINE, wrong, {**LINE, "id": "b"}))
    job = Job(made, _objects(read_lines(BytesIO(lines)), None), {"max_new_tokens": 3})
    results: list[Result] = []
    while job.admitting or job.running:
        results += [*job.admit(), *job.step()]
    results.sort(key=lambda each: each.index)
    assert [isinstance(each, Fault) for each in results] == [False, fails, False]
