"""The examples of docs/python.md that need packages which longspec doesn't: pandas, and FastAPI where it is there."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.agents import agent
from support.commands import ROOT

from longspec.engine.engine import Engine


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples load a tiny model."""
    monkeypatch.setattr(Engine, "load", lambda name: agent(tmp_path))


def example(package: str) -> dict[str, Any]:
    """The names that the example with this import leaves."""
    text = (ROOT / "docs" / "python.md").read_text()
    [code] = [code for code in re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL) if package in code]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    return names


@pytest.mark.usefixtures("loads")
def test_a_column_of_pandas() -> None:
    pytest.importorskip("pandas")
    assert set(example("import pandas")["reviews"]["kind"]) <= {"praise", "complaint", "neither"}


@pytest.mark.usefixtures("loads")
def test_a_service_by_fastapi() -> None:
    pytest.importorskip("fastapi")
    app = example("import FastAPI")["app"]

    async def got(path: str, text: str) -> bytes:
        """The body of an answer, without a socket."""
        sent, asked = list[dict[str, Any]](), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if asked.is_set():
                await asyncio.Event().wait()
            asked.set()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": path}
        await app({**scope, "query_string": f"text={text}".encode(), "headers": []}, receive, send)
        assert sent[0]["status"] == 200
        return b"".join(message.get("body", b"") for message in sent)

    async def run() -> tuple[bytes, bytes]:
        async with app.router.lifespan_context(app):
            return await got("/town", "Paris"), await got("/answer", "Paris")

    town, answer = asyncio.run(run())
    assert town == b"null" or set(json.loads(town)) == {"name", "country"}  # cut, or whole
    assert len(answer.decode()) > 10
