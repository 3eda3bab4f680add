"""Batches on Ray: what the cluster's part decides by itself, and whole batches on a Ray of this machine.

The tests on Ray are skipped where it isn't installed (the extra `ray`); they share one Ray.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.commands import SECONDS, call, started

from longspec.batch.marks import Marks
from longspec.batch.output import Output
from longspec.batch.records import Outcome
from longspec.batch.requests import Item
from longspec.batch.tally import Tally
from longspec.cli.io.batch_loop import Results
from longspec.cli.io.cluster_loop import ClusterLoop
from longspec.cli.io.progress import Progress
from longspec.cli.main import guarded
from longspec.engine.engine import Engine
from longspec.errors import LongspecError, UsageError
from longspec.ray import Writer
from longspec.ray.actor import Actor, Order, Report
from longspec.ray.cluster import Places, connected, nodes, places, where
from longspec.ray.shared import Shared
from longspec.ray.stream import Source, group_size, reports
from longspec.types import Stats

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray isn't installed: the extra `ray`")
quiet_ray = pytest.mark.filterwarnings("ignore")  # Ray's own warnings, and sockets that it leaves to the collector

SETTINGS = ["--threads", "1", "--dtype", "fp32", "--max-new-tokens", "12", "--temperature", "0.9"]


def prompts(path: Path, count: int) -> Path:
    texts = [{"id": f"n{i}", "prompt": f"Line {i * 7919 % 997} of {i % 13}."} for i in range(count)]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


def answers(out: Path) -> dict[Any, str]:
    read = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len({line["id"] for line in read}) == len(read)
    return {line["id"]: line["text"] for line in read if "text" in line}


def order(tiny: str, version: str | None = None) -> Order:
    from longspec import __version__

    loading = {"threads": 1, "dtype": "fp32", "device": "cpu"}
    return Order(version or __version__, tiny, loading, {"max_new_tokens": 12}, 4, False, os.getcwd())


# --- without a cluster


def test_an_address_is_ray_or_a_host_and_a_port() -> None:
    for on, said in {"spark": "not known", "ray:": "not known", "ray:ray://head:10001": "client server"}.items():
        with pytest.raises(UsageError, match=said):
            where(on)


@needs_ray
def test_no_answer_is_said_at_once(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and doesn't listen
        arguments = ["batch", str(prompts(home / "in.jsonl", 2)), "-o", str(home / "out"), "-m", tiny]
        port = taken.getsockname()[1]
        for address, said in {f"127.0.0.1:{port}": "No Ray cluster answers at", "head": "is no address"}.items():
            assert guarded([*arguments, "--on", f"ray:{address}"]) == 2
            assert said in capfd.readouterr().err


@needs_ray
def test_what_is_no_cluster_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspec.ray.cluster._CONNECT_SECONDS", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UsageError, match="No Ray cluster answers"), connected(address):
            pass


def test_without_ray_the_extra_is_named(home: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspec.ray.cluster.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'longspec\[ray\]'"):
        where("ray")


@needs_ray
@pytest.mark.parametrize(
    ("more", "said"),
    [(["--in-order"], "the slowest engine"), (["-"], "A pipe can't be read"), (["-o", "/no/o"], "/no/o")],
)
def test_what_a_cluster_cant_do_is_refused(
    tiny: str, home: Path, capfd: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    source = [] if "-" in more else [str(prompts(home / "in.jsonl", 2))]
    assert guarded(["batch", *source, "-o", str(home / "out"), "-m", tiny, "--on", "ray", *more]) == 2
    assert said in capfd.readouterr().err
    assert guarded(["batch", *source, "-o", str(home / "out"), "-m", tiny, "--actors", "2"]) == 2
    assert "add --on ray" in capfd.readouterr().err


def test_engines_fit_by_threads_or_by_gpus() -> None:
    two = [{"CPU": 8.0}, {"CPU": 4.0}]
    assert places(two, device="auto", threads=None) == Places(3, 4)
    assert places(two, device="cpu", threads=3) == Places(3, 3)
    assert places(two, device="cpu", threads=2, actors=4) == Places(4, 2)
    assert places([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}], device="auto", threads=None) == Places(2, 1, 1)
    assert places([{"CPU": 8.0, "GPU": 2.0}], device="cpu", threads=None) == Places(1, 8)
    for some, asked in ((two, {"device": "cuda"}), (two, {"device": "cpu", "threads": 9}), ([], {"device": "auto"})):
        with pytest.raises(UsageError, match="No node of the Ray cluster"):
            places(some, **{"threads": None, **asked})  # type: ignore[arg-type]


def test_groups_are_small_where_the_input_is() -> None:
    assert [group_size(count, 32) for count in (0, 1, 1_000, 10_000, 10**7)] == [8, 1, 3, 32, 32]


def test_calls_of_several_threads_share_passes(tiny: str) -> None:
    engine = Engine.load(tiny, threads=1, dtype="fp32", drafter="none")
    alone = [engine.generate(f"call {i}", max_new_tokens=9, key=f"k{i}").text for i in range(12)]
    shared, found = Shared(engine, {"max_new_tokens": 9}, 4), dict[int, list[str]]()

    def call(first: int) -> None:
        items = [Item(i, f"k{i}", f"call {i}", {}) for i in range(first, first + 3)]
        found[first] = [result.answer.text for result in shared.write(items)]  # type: ignore[union-attr]

    threads = [threading.Thread(target=call, args=(first,)) for first in (0, 3, 6, 9, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert [text for first in sorted(found) for text in found[first]] == alone
    assert any(row["texts"] == 4 for row in shared._job.times.report())


def test_no_call_waits_for_an_engine_that_broke(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared(Engine.load(tiny, threads=1, dtype="fp32", drafter="none"), {"max_new_tokens": 9})

    def broken() -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(shared._job, "step", broken)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no more"):
            shared.write([Item(0, "a", "text", {})])


def test_an_actor_of_another_version_writes_nothing(tiny: str) -> None:
    import pickle

    batch = {"group": [pickle.dumps([Item(0, "a", "text", {})])]}
    (report,) = map(pickle.loads, Actor(order(tiny, "9.9.9"))(batch)["report"])
    assert (report.outcomes, type(report.error)) == ((), LongspecError)
    assert "and the driver 9.9.9" in str(report.error)
    (report,) = map(pickle.loads, Actor(order("/no/such/model"))(batch)["report"])
    assert "/no/such/model" in str(report.error)
    assert report.error.exit_code == 3


def test_a_group_that_comes_twice_is_written_once_and_others_are_refused(home: Path) -> None:
    def report(actor: str, *ids: int, dtype: str = "bf16") -> Report:
        outcomes = [Outcome(b'{"id": %d, "index": 0, "text": ""}\n' % i, i + 1, 1, Stats(1, 0, 0, 2)) for i in ids]
        return Report(actor, {"dtype": dtype}, "ngram", outcomes)

    with Output(home / "out") as out:
        results = Results(out, Tally(0, 0), Progress("m", quiet=True), None, 0)
        begun: list[Any] = []
        stream = [report("a:1", 0, 1), report("b:2", 2), report("b:3", 0, 1, 3), report("c:4", 5, dtype="fp32")]
        loop = ClusterLoop(stream, results, Marks(), begun.append)
        with pytest.raises(LongspecError, match=r"a:1 and c:4 differ in their dtype \(bf16 and fp32\); give --dtype"):
            loop.go()
    assert begun == [{"dtype": "bf16"}]
    assert [json.loads(line)["id"] for line in (home / "out").read_text().splitlines()] == [0, 1, 2, 3]
    written = {name: actor["written"] for name, actor in loop.report()["actors"].items()}
    assert written == {"a:1": 2, "b:2": 1, "b:3": 1}


def test_writer_adds_columns_whose_texts_depend_on_no_place(tiny: str) -> None:
    writer = Writer(tiny, engine={"threads": 1, "dtype": "fp32"}, max_new_tokens=9, temperature=0.9)
    chat = [{"role": "user", "content": "in a list"}]
    found = writer({"prompt": ["one", "two", "", chat], "mine": [1, 2, 3, 4]})
    assert found["mine"] == [1, 2, 3, 4]
    assert found["completion_tokens"] == [9, 9, None, 9]
    assert found["error"] == [None, None, "'prompt' is empty", None]
    assert writer({"prompt": ["two"]})["text"] == found["text"][1:2]
    with pytest.raises(UsageError, match="no column 'prompt'; there are: text"):
        writer({"text": ["one"]})


# --- on a Ray of this machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray that the tests of this file share; the command takes the one that it is in."""
    with connected(None):
        yield


@needs_ray
@quiet_ray
def test_a_cluster_answers_at_its_address(cluster: None) -> None:
    import ray

    with connected(ray.get_runtime_context().gcs_address):  # it is this process's already, and only knocked at
        assert nodes()
    assert ray.is_initialized()


@needs_ray
@quiet_ray
def test_texts_are_those_of_one_process(
    cluster: None, tiny: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = prompts(home / "in.jsonl", 40)
    source.write_text(source.read_text() + "broken\n")
    arguments = ["batch", str(source), "-m", tiny, *SETTINGS, "-o"]
    assert guarded([*arguments, str(home / "one")]) == 1
    assert guarded([*arguments, str(home / "out"), "--limit", "10"]) == 0  # begun here, and gone on with there
    capfd.readouterr()
    assert guarded([*arguments, str(home / "out"), "--on", "ray", "--summary", str(home / "sum.json")]) == 1
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert "30 written, 1 failed, 10 there before" in stderr
    assert answers(home / "out") == answers(home / "one")
    summary = json.loads((home / "sum.json").read_text())
    assert sum(actor["written"] for actor in summary["actors"].values()) == 30
    before = (home / "out").read_bytes()
    assert guarded([*arguments, str(home / "out"), "--on", "ray"]) == 1
    assert "nothing is left to do" in capfd.readouterr().err
    assert (home / "out").read_bytes() == before


@needs_ray
@quiet_ray
def test_a_killed_actor_loses_nothing(cluster: None, tiny: str, home: Path) -> None:
    source = prompts(home / "in.jsonl", 60)
    given = Source((str(source),), None, None, None, False, None, str(home), group=3)
    found, killed = Marks(), False
    for report in reports(given, Marks(), order(tiny), Places(1, 1), 4):
        assert report.error is None
        for outcome in report.outcomes:
            found.add(outcome.mark)
        if not killed and len(found) >= 9:
            killed = True
            os.kill(int(report.actor.split(":")[1]), signal.SIGKILL)
    assert killed
    assert len(found) == 60


@needs_ray
@pytest.mark.full
def test_actors_and_drivers_killed_ten_times(tiny: str, home: Path) -> None:
    """Each run's driver, or one of its actors, is killed at random; the last one ends what is left."""
    source, out = prompts(home / "in.jsonl", 1_500), home / "out"
    arguments = ["batch", str(source), "-m", tiny, *SETTINGS, "-q", "-o"]
    assert guarded([*arguments, str(home / "one")]) == 0
    generator, kills = random.Random(5), 0
    while kills < 10:
        with started([*arguments, str(out), "--on", "ray"], home) as process:
            size, end = out.stat().st_size if out.exists() else 0, time.monotonic() + SECONDS
            while process.poll() is None and kills < 10:
                assert time.monotonic() < end
                time.sleep(0.01)
                if out.exists() and out.stat().st_size > size + 8_000:
                    time.sleep(generator.random() * 0.5)
                    size = out.stat().st_size
                    victims = actors_of(process.pid)
                    kills += 1
                    if victims and generator.random() < 0.7:
                        os.kill(generator.choice(victims), signal.SIGKILL)
                    else:
                        process.kill()
                        process.wait()
            assert process.poll() != 0 or kills == 10, "there was nothing left to kill"
    last = call([*arguments, str(out), "--on", "ray"], home)
    assert (last.code, last.out, last.err) == (0, b"", "")
    assert answers(out) == answers(home / "one")


def actors_of(driver: int) -> list[int]:
    """The processes of the driver's Ray that are a batch's actors, by the names that Ray gives them."""
    parents, actors = dict[int, int](), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status, name = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
            if b"MapWorker" in name:
                actors.append(int(folder.name))

    def is_below(process: int) -> bool:
        while process not in (0, 1, driver):
            process = parents.get(process, 0)
        return process == driver

    return [actor for actor in actors if is_below(actor)]
