"""What one client may keep of a server: heads, bodies, connections, prompts, and the time after it was told to end."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from contextlib import closing
from threading import Event, Thread
from time import monotonic
from typing import Any

import pytest
from support.commands import SECONDS
from support.engines import engine, tiny
from support.servers import Served, serving, until

from longspec.engine.engine import Engine
from longspec.requests.fields import RequestError, parse_object
from longspec.server import bodies, connection, listen, worker
from longspec.text.tokenizer import Vocabulary

CONTEXT = 2000
ONE = {"prompt": "A", "max_tokens": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine(tiny(tmp_path_factory.mktemp("tiny"), end_tokens=(), max_position_embeddings=CONTEXT))


@pytest.fixture
def served(made: Engine) -> Iterator[Served]:
    with serving(made) as up:
        yield up


def opened(served: Served, data: bytes = b"") -> socket.socket:
    """A connection on which so much was sent."""
    client = socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS)
    client.sendall(data)
    return client


def post(served: Served, body: bytes | dict[str, Any], length: int | None = None) -> socket.socket:
    """A connection with a request, whose body may be only begun."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json"
    lines = "\r\n".join([*head, f"Content-Length: {length or len(data)}", "", ""])
    return opened(served, lines.encode() + data)


def read(client: socket.socket) -> bytes:
    """All that the server says on it."""
    with client.makefile("rb") as file:
        return file.read()


def is_closed(client: socket.socket) -> bool:
    """Whether the server closes it without a word."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def open_connections(served: Served) -> int:
    return sum(len(server.server_state.connections) for server, _ in served.listener._servers)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_half_a_head_has_its_time(served: Served, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    with closing(opened(served, sent)) as client:
        assert is_closed(client)
    assert served.ask(ONE)[0] == 200


def test_a_body_that_was_answered_early_has_its_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    with closing(opened(served, b"POST /none HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n")) as client:
        assert b" 404 " in client.recv(1000)
        client.sendall(b"more")
        while not is_closed(client):
            pass
    until(lambda: open_connections(served) == 0)


def test_a_body_has_its_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    with closing(post(served, b"{", length=100)) as client:
        assert b" 408 " in read(client)


def test_a_large_head_is_refused(served: Served) -> None:
    large = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (connection.HEAD_NBYTES + 70_000)
    with closing(opened(served)) as client:
        try:
            client.sendall(large)
            assert b" 400 " in client.recv(1000)
        except ConnectionError:
            pass  # it was closed while more was sent
    assert served.ask(ONE)[0] == 200


def test_slow_connections_lock_nobody_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has waited longest for a head gives way; one that is being answered never does."""
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 3)
    streaming = post(served, {"prompt": "A", "max_tokens": 400, "stream": True})
    assert b" 200 " in streaming.recv(30)
    slow = [opened(served, b"GET /") for _ in range(6)]
    assert all(map(is_closed, slow[:3]))
    assert served.ask(ONE)[0] == 200
    with closing(streaming):
        assert b"[DONE]" in read(streaming)
    for client in slow:
        client.close()


def test_a_body_of_many_values_is_refused(served: Served) -> None:
    for data in (b"[],", b'{"":0},', b"0,"):
        status, answer = served.ask(b'{"prompt": [' + data * bodies.MOST_VALUES)
        assert status == 413
        assert ("names of fields" if b":" in data else "commas and brackets") in answer["error"]["message"]


def test_a_body_of_many_names_is_refused(served: Served) -> None:
    for name in (b'"":0,', b'"" : 0,', b'"a\\\\":0,'):  # the last one ends with a backslash, which escapes nothing
        status, answer = served.ask(b'{"prompt": {' + name * (bodies.MOST_NAMES + 1) + b'"a":0}}')
        assert status == 413
        assert "names of fields" in answer["error"]["message"]
    quoted = json.dumps({"prompt": json.dumps(dict.fromkeys(range(1000), 1)) * 200, "max_tokens": 1})
    assert served.ask(quoted.encode())[1]["error"]["code"] == "context_length_exceeded"  # names in a text are letters


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}] * 129}),
        ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{}] * 100}] * 50}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 5000}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}] * 5000}),
        ("responses", {"input": [{"role": "assistant", "content": "a"}] * 5000}),
        ("messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}] * 5000}),
    ],
)
def test_what_is_checked_one_by_one_is_counted_first(served: Served, path: str, body: dict[str, Any]) -> None:
    status, answer = served.ask(body, f"/v1/{path}")
    assert status == 400
    assert "may have" in answer["error"]["message"] or "more than 4,096; send fewer" in answer["error"]["message"]


def test_what_is_nested_deeply_is_refused(served: Served) -> None:
    """Whatever is as deep as JSON is read, and by whatever it is looked at."""

    def nested(depth: int) -> str:
        return '{"type":"array","items":' * depth + '{"type":"string"}' + "}" * depth

    message = '"messages":[{"role":"user","content":"a"}]'
    function = '{"type":"function","function":{"name":"f","strict":true,"parameters":%s}}'
    for depth in (300, 450, 600, 800, *range(900, 1000, 6)):
        for path, body in (
            ("chat/completions", f'{{{message},"response_format":{{"type":"json_object","schema":{nested(depth)}}}}}'),
            ("chat/completions", f'{{{message},"tools":[{function % nested(depth)}],"tool_choice":"required"}}'),
            (
                "messages",
                '{"max_tokens":1,"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"a","name":"f",'
                f'"input":{{"a":{"[" * depth + "]" * depth}}}}}]}}]}}',
            ),
        ):
            status, answer = served.ask(body.encode(), f"/v1/{path}")
            assert status == 400, (depth, path, answer)
    assert served.said == []


def test_large_bodies_together_keep_no_small_one_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "ALL_NBYTES", 3 * bodies.SMALL_NBYTES)
    slow = [post(served, b" " * (2 * bodies.SMALL_NBYTES), length=bodies.MOST_NBYTES) for _ in range(2)]
    refused = next(client for client in select.select(slow, [], [], SECONDS)[0])  # whichever came second
    answer = refused.recv(1000)
    assert b" 429 " in answer
    assert b"retry-after: 5" in answer
    assert served.ask(ONE)[0] == 200
    for client in slow:
        client.close()
    large = b'{"prompt": "A", "max_tokens": 1}' + b" " * 2 * bodies.SMALL_NBYTES
    until(lambda: served.ask(large)[0] == 200)  # what was held is free again, once the server has seen them go


def test_a_refusal_quotes_little(served: Served) -> None:
    for body in ({"x" * 100_000: 1}, {**ONE, "model": "x" * 100_000}, {"prompt": ["x" * 100_000, 1]}):
        assert len(json.dumps(served.ask(body)[1])) < 4000


def test_a_prompt_far_beyond_the_context_is_not_tokenized(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(Vocabulary, "encode", refuse)
    long = "A" * 6 * CONTEXT  # the longest token is <pad>, with five characters
    for path, body in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
    ):
        status, answer = served.ask(body, path)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert f"hold at most {5 * CONTEXT:,}" in answer["error"]["message"]


def slow_reading(made: Engine, patch: pytest.MonkeyPatch) -> tuple[Event, list[str]]:
    """Long prompts take until the event is set; the first characters of those that were begun."""
    go, begun, prepare = Event(), list[str](), made.prepare

    def reading(prompt: Any, **options: Any) -> Any:
        if len(prompt) > worker.LONG_PROMPT:
            begun.append(prompt[:1])
            go.wait(SECONDS)
        return prepare(prompt, **options)

    patch.setattr(made, "prepare", reading)
    return go, begun


def long(name: str) -> dict[str, Any]:
    return {"prompt": name * (worker.LONG_PROMPT + 1)}


def test_nobody_waits_for_another_prompt_to_be_read(made: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = slow_reading(made, monkeypatch)
    with serving(made) as served:
        reading, waiting, leaving = (post(served, long(name)) for name in "ABC")
        until(lambda: len(served.desk) == 3)
        assert served.ask(ONE)[0] == 200
        leaving.close()
        until(lambda: len(served.desk) == 2)
        go.set()
        for client in (reading, waiting):
            assert b"context_length_exceeded" in read(client)
            client.close()
        assert sorted(begun) == ["A", "B"]  # what was abandoned isn't read


def test_a_server_ends_while_a_prompt_is_read(made: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "LAST_SECONDS", 0.8)
    go, begun = slow_reading(made, monkeypatch)
    with serving(made) as served:
        half = [opened(served, b"GET /"), post(served, b"{", length=100)]
        with closing(post(served, long("A"))) as client:
            until(lambda: bool(begun))
            before = monotonic()
            ending = Thread(target=served.stop)
            ending.start()
            answer = read(client)
            ending.join(SECONDS)
        assert b" 503 " in answer
        assert b"while its prompt was being read" in answer
        assert monotonic() - before < 10  # its grace is a second; the rest is this machine's
        go.set()
        for each in half:
            each.close()


@pytest.mark.parametrize(
    "odd", ['"\\ud800"', "NaN", "1e999", "-0", "123456789012345678901234567890", "[" * 300 + "]" * 300]
)
def test_a_large_body_is_read_as_a_small_one(odd: str) -> None:
    small = parse_object(f'{{"a": {odd}, "a b": "\\u00e9"}}'.encode(), "It")
    large = parse_object(f'{{"a": {odd}, "a b": "\\u00e9", "more": "{"x" * 70_000}"}}'.encode(), "It")
    assert repr(large.pop("more")) == repr("x" * 70_000)
    assert repr(large) == repr(small)
    for wrong in (b'{"a": tru', b'{"a": "\xff"'):
        said = []
        for text in (wrong, b" " * 70_000 + wrong):
            with pytest.raises(RequestError, match="It isn't JSON") as refused:
                parse_object(text, "It")
            said.append(str(refused.value).partition(":")[2].split(" at ")[0].split(" in ")[0].partition("line")[0])
        assert said[0] == said[1]
