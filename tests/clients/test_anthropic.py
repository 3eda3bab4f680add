"""Anthropic's own client: messages, streams, tools and thoughts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.agents import TOWN, agent
from support.commands import SECONDS
from support.servers import Served, serving

anthropic = pytest.importorskip("anthropic", reason="the client isn't installed (the extra clients)")

USER: Any = [{"role": "user", "content": "Where to?"}]
TOOLS: Any = [{"name": name, "input_schema": TOWN} for name in ("weather", "rain")]
ASKED: Any = {"model": "tiny", "messages": USER, "max_tokens": 900, "extra_body": {"temperature": 1.0, "seed": 4}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(agent(tmp_path_factory.mktemp("agent")), key="sesame") as up:
        yield up


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    url = f"http://127.0.0.1:{served.port}"
    with anthropic.Anthropic(base_url=url, api_key="sesame", max_retries=0, timeout=SECONDS) as made:
        yield made


def test_a_message_and_its_stream(served: Served, client: Any) -> None:
    asked: Any = {"model": "tiny", "messages": USER, "system": [{"type": "text", "text": "Short."}], "max_tokens": 20}
    whole = client.messages.create(**asked)
    told: Any = [{"role": "system", "content": "Short."}, *USER]
    assert whole.content[0].text == served.engine.generate(told, max_new_tokens=20).text
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 20)
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().stop_reason == "max_tokens"


def test_tools_and_thoughts(client: Any) -> None:
    asked: Any = {**ASKED, "tools": TOOLS, "tool_choice": {"type": "any"}}
    whole = client.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    assert {block.type for block in whole.content} == {"tool_use"}
    assert all(block.input["city"] in ("Bonn", "Oslo") for block in whole.content)
    with client.messages.stream(**asked) as stream:
        last = stream.get_final_message()
    assert [(block.name, block.input) for block in last.content] == [(b.name, b.input) for b in whole.content]
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "wet"} for block in whole.content]
    again: Any = [*USER, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    assert client.messages.create(model="tiny", messages=again, tools=TOOLS, max_tokens=3).content


def test_what_is_refused(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\].type"):
        client.messages.create(**ASKED, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    with pytest.raises(anthropic.BadRequestError, match="container isn't supported"):
        client.messages.create(model="tiny", messages=USER, max_tokens=3, extra_body={"container": "x"})
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**ASKED)
