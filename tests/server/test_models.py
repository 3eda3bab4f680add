"""Several models in one server: loaded when a request names one, unloaded when idle, within one budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import SECONDS
from support.engines import engine, tiny
from support.servers import Served, serving, until

from longspec.errors import BudgetError
from longspec.server import models as room
from longspec.server.desk import Desk
from longspec.server.models import Models
from longspec.server.refusals import RefusedError
from longspec.server.worker import Worker

NAMES = ("../../etc/passwd", "/etc/passwd", "tiny\0", "", "TINY", "a" * 5000, "hf://evil/model", "~/x.gguf")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    began: list[Worker] = []

    def start(_: int | None) -> Worker:
        began.append(Worker(lambda: engine(tiny(tmp_path / str(len(began)), "qwen2"), "ngram"), 4))
        return began[-1]

    with serving(engine(tiny(tmp_path / "first")), also={"other": start}, idle=0.2) as up:
        up.began = began
        yield up


def test_a_model_is_loaded_when_it_is_asked_for_and_goes_when_it_isnt(served: Served) -> None:
    asked = {"prompt": "ABC", "max_tokens": 5}
    assert served.began == []
    status, first = served.ask({**asked, "model": "other"})
    assert (status, first["model"]) == (200, "other")
    assert served.ask({**asked, "model": "other"})[1]["choices"][0]["text"] == first["choices"][0]["text"]
    assert len(served.began) == 1
    until(lambda: served.began[0].loaded.result().is_closed)
    assert served.ask({**asked, "model": "other"})[1]["choices"][0]["text"] == first["choices"][0]["text"]
    assert len(served.began) == 2
    with served.client() as client:
        assert [each.id for each in client.models.list()] == ["tiny", "other"]
        assert client.models.retrieve("other").id == "other"


def test_no_stranger_names_a_path(served: Served) -> None:
    for name in NAMES:
        status, answer = served.ask({"prompt": "ABC", "max_tokens": 1, "model": name})
        assert (status, answer["error"]["code"]) == (404, "model_not_found"), name
        assert answer["error"]["type"] == "invalid_request_error"
    assert served.began == []


@dataclass
class StandIn:
    """A worker whose model takes so many bytes of a process that has none."""

    need: int
    memory: int | None
    kept: int = 0
    closed: bool = False
    loaded: Future[Any] = field(default_factory=Future)

    def __post_init__(self) -> None:
        budget = 100 if self.memory is None else self.memory
        if self.need > budget:
            self.loaded.set_exception(BudgetError("too much"))
        else:
            plan = SimpleNamespace(budget=budget, choice=SimpleNamespace(need=SimpleNamespace(total=self.need)))
            self.loaded.set_result(SimpleNamespace(plan=plan))

    def __len__(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True


def test_models_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "resident_bytes", lambda: 0)  # all that is planned is still to come
    began: dict[str, list[StandIn]] = {"a": [], "b": [], "c": [], "large": []}

    def start(name: str, need: int) -> Callable[[int | None], Any]:
        def load(memory: int | None) -> StandIn:
            began[name].append(StandIn(need, memory))
            return began[name][-1]

        return load

    async def run() -> None:
        desk = Desk(8, SECONDS)
        models = Models(
            desk, {name: start(name, need) for name, need in {"a": 40, "b": 50, "c": 30, "large": 200}.items()}
        )
        models.begin()
        async with models.using("b"):
            pass
        async with models.using("c") as held:  # a was used least recently
            assert [each.closed for each in began["a"]] == [True]
            assert [each.memory for each in began["c"]] == [10, 50]
            async with models.using("b"):
                with pytest.raises(RefusedError, match="no memory for a beside b, c") as refused:
                    async with models.using("a"):
                        pass
                assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "5")
            monkeypatch.setattr(desk, "writes", lambda worker: worker is held)
        with pytest.raises(RefusedError, match="beside c"):
            async with models.using("large"):
                pass
        monkeypatch.undo()
        with pytest.raises(BudgetError):
            async with models.using("large"):
                pass

    asyncio.run(run())
