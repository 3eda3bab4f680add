"""Clients that stand on OpenAI's: litellm, instructor, langchain and llm; each is run where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.agents import Town, tool
from support.commands import SECONDS
from support.servers import Served

USER: Any = [{"role": "user", "content": "Where to?"}]
TOOLS: Any = [tool("weather"), tool("rain")]
WRITTEN: Any = {"temperature": 1.0, "seed": 4, "max_tokens": 900}


@pytest.fixture(scope="module")
def place(served: Served) -> str:
    return f"http://127.0.0.1:{served.port}/v1"


def is_town(arguments: Any) -> bool:
    return bool(Town.model_validate(json.loads(arguments) if isinstance(arguments, str) else arguments))


# --- litellm


@pytest.mark.filterwarnings("default")
def test_litellm(place: str) -> None:
    litellm = pytest.importorskip("litellm")
    asked = {"model": "openai/tiny", "api_base": place, "api_key": "none", "timeout": SECONDS, "messages": USER}
    whole = litellm.completion(**asked, max_tokens=12).choices[0].message.content
    pieces = litellm.completion(**asked, max_tokens=12, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
    called = litellm.completion(**asked, **WRITTEN, tools=TOOLS, tool_choice="required").choices[0]
    assert called.finish_reason == "tool_calls"
    assert all(is_town(call.function.arguments) for call in called.message.tool_calls)
    parsed = litellm.completion(**asked, **WRITTEN, response_format=Town).choices[0].message.content
    assert is_town(parsed)


# --- instructor


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(served: Served, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    with served.client() as client:
        wrapped = instructor.from_openai(client, mode=instructor.Mode[mode])
        found = wrapped.chat.completions.create(
            model="tiny", messages=USER, response_model=Town, max_retries=0, **WRITTEN
        )
        assert isinstance(found, Town)


# --- langchain


@pytest.mark.filterwarnings("default")
def test_langchain(place: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        base_url=place, api_key="none", model="tiny", temperature=1.0, seed=4, max_tokens=900, timeout=SECONDS
    )
    short = model.bind(max_tokens=12)
    whole = short.invoke("Where to?")
    assert "".join(piece.content for piece in short.stream("Where to?")) == whole.content
    assert whole.usage_metadata["output_tokens"] == 12
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Town, method=method).invoke("Where to?"), Town)
    calls = model.bind_tools(TOOLS, tool_choice="required").invoke("Where to?").tool_calls
    assert calls
    assert all(call["name"] in ("weather", "rain") and is_town(call["args"]) for call in calls)
    responses = langchain.ChatOpenAI(
        base_url=place, api_key="none", model="tiny", use_responses_api=True, max_tokens=20, timeout=SECONDS
    )
    assert responses.invoke("Where to?").content


# --- llm


@pytest.mark.filterwarnings("default")
def test_llm(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = pytest.importorskip("llm")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    described = f"model_id: tiny, model_name: tiny, api_base: '{place}', supports_tools: true, supports_schema: true"
    (tmp_path / "extra-openai-models.yaml").write_text(f"- {{{described}}}\n")
    model = llm.get_model("tiny")
    model.key = "none"
    assert model.prompt("Where to?", stream=False, max_tokens=12).text()
    assert "".join(model.prompt("Where to?", max_tokens=12))
    asked = {"temperature": 1.0, "seed": 4, "max_tokens": 900}
    assert is_town(model.prompt("Where to?", schema=Town, stream=False, **asked).text())
    weather = llm.Tool(name="weather", description="", input_schema=Town.model_json_schema())
    answer = model.prompt("Where to?", tools=[weather], stream=False, **asked)
    assert answer.text() is not None  # llm asks with tool_choice auto: whether it calls is the model's choice
