"""Several threads on one engine, and engines in threads of their own: the tokens of one text after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Lock, Thread
from time import sleep
from typing import Any

import pytest
from support.engines import engine, prompts, tiny

from longspec.engine.engine import Engine
from longspec.model.load import Model

TEXTS = prompts(6, 80)
SAMPLED: Any = {"raw": True, "max_new_tokens": 14, "temperature": 0.8, "seed": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"))


def write(made: Engine) -> Callable[[str], tuple[int, ...]]:
    return lambda text: made.generate(text, **SAMPLED).tokens


@pytest.mark.parametrize("drafter", ["none", "recycle+ngram", "exit", "model+ngram"])
def test_threads_on_one_engine_get_what_each_would_get_alone(model: Model, drafter: str) -> None:
    alone = [write(engine(model))(text) for text in TEXTS]
    made = engine(model, drafter)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write(made), TEXTS)) == alone


def test_two_engines_in_two_threads(model: Model, tmp_path: Path) -> None:
    engines = [engine(model, "ngram"), engine(tiny(tmp_path, "qwen2"), "recycle+ngram")]
    alone = [[write(made)(text) for text in TEXTS] for made in engines]
    together, barrier = [list[tuple[int, ...]](), list[tuple[int, ...]]()], Barrier(2)

    def run(place: int) -> None:
        barrier.wait()
        together[place] += map(write(engines[place]), TEXTS)

    threads = [Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_passes_of_one_model_come_one_after_the_other(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, within, most, guard = model.decoder.forward, 0, 0, Lock()

    def counted(*args: Any) -> Any:
        nonlocal within, most
        with guard:
            within += 1
            most = max(most, within)
        sleep(0.002)
        result = forward(*args)
        with guard:
            within -= 1
        return result

    monkeypatch.setattr(model.decoder, "forward", counted)
    engines = [engine(model), engine(model, "ngram")]  # of one model: they share its workspace
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: write(engines[i % 2])(TEXTS[i]), range(4)))
    assert most == 1


def test_a_stream_that_nobody_reads_holds_up_no_other_thread(model: Model) -> None:
    made, done = engine(model), Event()
    stream = made.stream(TEXTS[0], **SAMPLED)
    next(stream)

    def other() -> None:
        made.generate(TEXTS[1], **SAMPLED)
        done.set()

    thread = Thread(target=other, daemon=True)
    thread.start()
    assert done.wait(60)
    assert "".join(stream)
