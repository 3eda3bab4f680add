"""Mutants of requests and of a batch's records: each is answered, or refused with a sentence; nothing else happens.

`requests` and `records` are targets of tests/hostile, which tries thousands.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.commands import SECONDS
from support.engines import engine, tiny, vocabulary
from support.hostile import Attempt
from support.letters import TEMPLATE
from support.mutants import VALUES, of_bytes, of_json

from longspec.batch.inputs import _objects, _openai
from longspec.batch.job import Job, Result
from longspec.batch.lines import read_lines
from longspec.batch.records import line
from longspec.batch.requests import Fault
from longspec.engine.engine import Engine
from longspec.errors import UsageError
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
COMPLETION: dict[str, Any] = {"prompt": ["ABC", "D"], "n": 2, "max_tokens": 3, "stop": ["A"], "seed": 1}
COMPLETION |= {"temperature": 1, "top_p": 0.5}
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
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", AGENT),
    ("/v1/completions", COMPLETION),
    ("/v1/responses", RESPONSE),
    ("/v1/messages", MESSAGE),
]
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer"},
    {"enum": ["A", 1]},
    {"enum": []},
    {"not": {}},
    {"$ref": "#"},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "string", "pattern": "(A|AA)*B{1000}"},
    {"type": "string", "minLength": 10**9},
]
EDGES: list[dict[str, Any]] = [
    *({"temperature": each} for each in (0, 5e-324, 1e-38, 1e-7, 2)),
    *({"temperature": 1, "top_p": each} for each in (5e-324, 1e-38, 1e-7, 1 - 1e-16, 1)),
    *({"temperature": 1e-38, "top_p": each, "min_p": 1} for each in (1e-30, 0.5)),
    *({"temperature": 1, "top_k": each} for each in (1, 96, 2**31 - 1)),
    *({"repetition_penalty": each} for each in (1e-6, 1e6)),
    *({"temperature": 1, "seed": each} for each in (0, 2**63 - 1, 2**64 - 1)),
    *({"max_tokens": each, "max_new_tokens": each} for each in (1, 255, 10**6)),
    *({"stop": each} for each in ("A", "\0", "😀" * 1000, ["A"] * 100, ["<s>", "</s>"])),
    *({"logit_bias": {token: each}} for token in ("0", "2", "95", "96") for each in (-100, 100)),
    *({"messages": [{"role": "user", "content": each}]} for each in ("A" * 5000, "\0", "</s>A<s>", "é\u200b", " ")),
    *({"prompt": each} for each in ("A" * 5000, "</s>", ["A"] * 16, "\0")),
    *({"response_format": {"type": "json_schema", "json_schema": {"schema": each}}} for each in SCHEMAS),
    {"n": 8}, {"stream": False}, {"logprobs": True, "top_logprobs": 20}, {"logprobs": 5}, {"stop_loops": False},
    {"longspec": {"drafter": "ngram"}}, {"reasoning_budget": 0}, {"tool_choice": "required"}, {"tools": []},
]  # fmt: skip
"""Values at the edge of what is let pass, which go all the way to the engine."""


def mutant(good: Sequence[Any], random: Random) -> bytes:
    """A good request at its edges, or with values, names and shapes changed, fields added, some torn as bytes."""
    value = random.choice(good)
    if random.random() < 0.5:
        edges = {name: each for edge in random.choices(EDGES, k=random.randint(1, 2)) for name, each in edge.items()}
        return json.dumps(
            {**value, "body": {**value["body"], **edges}} if "body" in value else {**value, **edges}
        ).encode()
    value = of_json(value, random)
    if isinstance(value, dict) and random.random() < 0.5:
        value[random.choice(NAMES)] = random.choice(VALUES)()
    data = json.dumps(value).encode()
    return of_bytes(data, random) if random.random() < 0.2 else data


def engine_in(folder: Path) -> Engine:
    """One whose template takes tools."""
    model = tiny(folder, max_position_embeddings=256)
    words = vocabulary(model.decoder.config.vocabulary, TEMPLATE + "{{ '<tool_call>' if tools }}")
    return engine(replace(model, vocabulary=words), "ngram")


def working(made: Engine) -> Worker:
    up = Worker(lambda: made, 8)
    up.loaded.result(SECONDS)
    return up


def requests(folder: Path) -> Attempt:
    """A server's worker, which is asked one thing after the other; a refusal is raised."""
    worker = working(engine_in(folder))

    def attempt(random: Random) -> None:
        path, good = random.choice(GOOD)
        body = mutant([good], random)
        status = asyncio.run(asked(worker, path if random.random() < 0.9 else random.choice(GOOD)[0], body))
        if status != 200:
            raise UsageError(f"status {status}")

    return attempt


def records(folder: Path) -> Attempt:
    """A record between two others; its error is raised."""
    made = engine_in(folder)

    def attempt(random: Random) -> None:
        read, good = random.choice([(_objects, [LINE, TALK]), (_openai, [REQUEST])])
        beside, between = json.dumps(good[0]).encode(), mutant(good, random).replace(b"\n", b" ")
        results = written(made, read, [beside, between, beside.replace(b'"a"', b'"b"')])
        failed = [each for each in results if isinstance(each, Fault)]
        assert all(each.index == 1 for each in failed)
        if failed:
            raise UsageError(failed[0].reason)

    return attempt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_in(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def worker(made: Engine) -> Iterator[Worker]:
    up = working(made)
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


async def asked(worker: Worker, path: str, body: bytes) -> int:
    """The status of an answer that is right or a sentence."""
    complaints: list[str] = []
    desk = Desk(8, SECONDS)
    app = open_to_clients(desk, Models(desk, {"tiny": lambda _: worker}), None, None, complaints.append)
    status, answer = await ask(app, path, body)
    assert status == 200 or 400 <= status < 500, (body, answer)
    if status != 200:
        said = json.loads(answer)["error"]["message"]
        assert said.endswith((".", "...")), said
    assert b'"server_error"' not in answer
    assert all(each in answer.decode() for each in complaints), complaints  # such as that no letter fits its grammar
    assert len(desk) == 0
    return status


def written(made: Engine, read: Any, records: Iterable[bytes]) -> list[Result]:
    """What became of a batch's lines, of which each has one result."""
    whole = b"\n".join(records)
    wanted = sum(not each.is_blank for each in read_lines(BytesIO(whole)))
    job = Job(made, read(read_lines(BytesIO(whole)), None), {"max_new_tokens": 3})
    results: list[Result] = []
    while job.admitting or job.running:
        results += [*job.admit(), *job.step()]
    results.sort(key=lambda each: each.index)
    assert [each.index for each in results] == list(range(wanted))
    assert all(json.loads(line(result, openai=read is _openai)) for result in results)
    assert [each.reason for each in results if isinstance(each, Fault) and not each.reason.strip()] == []
    return results


def test_every_request_is_answered_or_refused(worker: Worker, pytestconfig: pytest.Config) -> None:
    random = Random(pytestconfig.option.seed)
    for path, good in GOOD:
        assert asyncio.run(asked(worker, path, json.dumps(good).encode())) == 200
    statuses = set[int]()
    for _ in range(100):
        path, good = random.choice(GOOD)
        statuses.add(asyncio.run(asked(worker, path, mutant([good], random))))
    assert {200, 400} <= statuses
    assert len(worker) == 0


def test_every_record_has_its_line(made: Engine, pytestconfig: pytest.Config) -> None:
    """A failed record is its own line, and those beside it are written."""
    random = Random(pytestconfig.option.seed)
    for read, good in ((_objects, [LINE, TALK]), (_openai, [REQUEST])):
        lines = [json.dumps(each).encode() for each in good]
        lines += [mutant(good, random).replace(b"\n", b" ") for _ in range(50)]
        results = written(made, read, lines)
        assert 0 < sum(isinstance(result, Fault) for result in results) < len(results)


@pytest.mark.parametrize(
    ("path", "wrong", "said"),
    [
        ("/v1/messages", {**MESSAGE, "tool_choice": {"type": [["any"]]}}, "tool_choice.type is"),
        ("/v1/messages", {**MESSAGE, "tool_choice": {"type": {"any": 1}}}, "tool_choice.type is"),
        ("/v1/completions", {**COMPLETION, "stop": ["A", "\ud800"]}, "half a character"),
        ("/v1/chat/completions", {**CHAT, "stop": "A\udc00"}, "half a character"),
    ],
)
def test_a_value_found_by_mutants_is_refused(worker: Worker, path: str, wrong: dict[str, Any], said: str) -> None:
    desk = Desk(8, SECONDS)
    app = open_to_clients(desk, Models(desk, {"tiny": lambda _: worker}), None, None, lambda line: None)
    status, answer = asyncio.run(ask(app, path, json.dumps(wrong).encode()))
    assert (status, said in json.loads(answer)["error"]["message"]) == (400, True), answer


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
    results = written(made, _objects, (json.dumps(each).encode() for each in (LINE, wrong, {**LINE, "id": "b"})))
    assert [isinstance(each, Fault) for each in results] == [False, fails, False]
