"""What operators look at, and what a chat's next turn reads: ids, logs, metrics, foreign pages, kept prefixes."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
from support.agents import TOWN, agent
from support.commands import SECONDS
from support.servers import Served, serving, until

from longspec.engine.engine import Engine
from longspec.server.desk import Desk
from longspec.server.worker import Ended, Event, Opened, Order, Reading, Worker
from longspec.types import Commit

_SCHEMA = {"type": "array", "items": TOWN, "minItems": 3, "maxItems": 9}
TOWNS = {"type": "json_schema", "json_schema": {"name": "towns", "schema": _SCHEMA}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def served(made: Engine) -> Iterator[Served]:
    with serving(made, log="json", origins=["http://page.example"]) as up:
        yield up


def got(served: Served, method: str, path: str, **headers: str) -> tuple[int, Any, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_each_request_has_an_id_and_a_line(served: Served) -> None:
    served.said.clear()
    _, headers, _ = got(served, "GET", "/v1/models/tiny")
    until(lambda: bool(served.said))
    line = json.loads(served.said[0])
    assert line["id"] == headers["x-request-id"]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/models/tiny", 200)
    assert got(served, "GET", "/v1/models/other")[0] == 404


def test_metrics_are_prometheus(served: Served) -> None:
    served.ask({"prompt": "ABC", "max_tokens": 4})
    status, headers, text = got(served, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    for name in ("time_to_first_token_seconds_count", "tokens_per_step_sum", "resident_bytes", "texts_open"):
        assert re.search(rf"^longspec_{name} [0-9]", text.decode(), re.MULTILINE), name
    assert 'longspec_answers_total{finish_reason="length"}' in text.decode()


def test_pages_of_a_named_origin_may_ask(served: Served) -> None:
    asks = {"access_control_request_method": "POST", "access_control_request_headers": "authorization,content-type"}
    status, headers, _ = got(served, "OPTIONS", "/v1/chat/completions", origin="http://page.example", **asks)
    assert (status, headers["access-control-allow-origin"]) == (200, "http://page.example")
    assert got(served, "OPTIONS", "/v1/chat/completions", origin="http://evil.example", **asks)[0] == 400
    assert got(served, "GET", "/v1/models", origin="http://page.example")[1]["access-control-allow-origin"]


def test_what_comes_before_all_prompts_are_read_is_told_in_order() -> None:
    """A text may be written on while another's prompt is read, and the loop hears of both at once."""
    orders: list[Order] = []
    commits = [Commit((1,), letter, 0, 0) for letter in "abc"]

    async def run() -> list[str]:
        worker: Any = SimpleNamespace(write=orders.append, drop=lambda order: None)
        texts = Desk(8, SECONDS).take(worker, [("A", {}), ("B", {})], asyncio.Event().wait)  # type: ignore[arg-type]
        first, second = orders
        told_first: list[Event] = [Opened(1), *commits[:2]]
        for event in told_first:
            first.tell(event)
        second.tell(Opened(1))
        first.tell(commits[2])
        await texts.opened()
        told = texts.told()
        return [event.text for _, event in [await anext(told) for _ in commits] if isinstance(event, Commit)]

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_a_long_prompt_tells_how_far_it_is_read(made: Engine) -> None:
    events: list[Event] = []
    worker = Worker(lambda: made, 8)
    worker.loaded.result(SECONDS)
    worker.write(Order("abc" * 500, {"max_new_tokens": 2}, events.append))
    until(lambda: any(isinstance(event, Ended) for event in events))
    worker.stop(SECONDS)
    [opened] = [event for event in events if isinstance(event, Opened)]
    told = [event for event in events if isinstance(event, Reading)]
    assert {one.total for one in told} == {opened.prompt_tokens - 1}
    assert [one.done for one in told] == [*range(made.prefill_rows, opened.prompt_tokens - 1, made.prefill_rows)]


# --- kept prefixes


def test_a_next_turn_reads_its_new_tokens_only(made: Engine) -> None:
    with serving(made, kept=1 << 24) as served, serving(made) as bare:
        talk: list[dict[str, Any]] = []
        for turn in range(6):
            talk.append({"role": "user", "content": f"{turn}: " + "where to, and why? " * 5})
            body = {"messages": talk, "temperature": 0.8, "seed": turn, "response_format": TOWNS}
            answers = [up.ask(body, "/v1/chat/completions")[1] for up in (served, bare)]
            [text, same] = [answer["choices"][0]["message"]["content"] for answer in answers]
            assert text == same
            assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            usage = answers[0]["usage"]
            new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            # The question and two roles' letters, and the last token of the answer, which nothing has followed yet.
            assert turn == 0 or new <= len(talk[-1]["content"]) + 3
            talk.append({"role": "assistant", "content": text})
