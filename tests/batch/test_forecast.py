"""The forecast of a batch: the simulated scheduler beside a naive one, pass by pass, and beside the engine's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from longspec.batch.forecast import Lengths, simulate
from longspec.batch.passes import PassTimes
from longspec.cli.main import guarded
from longspec.engine.engine import Engine
from longspec.engine.scheduler import Schedule
from longspec.errors import UsageError


def measured(width: int = 8) -> PassTimes:
    times = PassTimes()
    for texts in range(1, width + 1):
        times.add(texts, 0, 100 * (0.01 + 0.002 * texts), 100)
        times.add(texts, 512, 100 * (0.05 + 0.002 * texts), 100)
        times.add(texts, 64, 100 * (0.02 + 0.002 * texts), 100)
    return times


def naive(lengths: Lengths, seconds: list[list[float]], width: int, tokens_per_step: float) -> tuple[float, int]:
    """Pass by pass, as `Schedule.step` does it: seconds and passes."""
    sums = np.concatenate([[0], np.rint(np.cumsum(lengths.answers / tokens_per_step))])
    steps = [max(1, int(count)) for count in np.diff(sums)]
    waiting, writing, reading = list(range(len(steps))), list[list[int]](), None
    now, passes = 0.0, 0
    while waiting or writing or reading:
        while reading is None and waiting and len(writing) < width and lengths.arrivals[waiting[0]] <= now:
            one = waiting.pop(0)
            left = max(0, int(lengths.prompts[one]) - 1)
            if left:
                reading = [one, left]
            else:
                writing.append([one, steps[one]])
        if not writing and reading is None:
            now = float(lengths.arrivals[waiting[0]])
            continue
        chunk = min(512, reading[1]) if reading else 0
        now, passes = now + seconds[len(writing)][-(-chunk // 64)], passes + 1
        for each in writing:
            each[1] -= 1
        writing = [each for each in writing if each[1]]
        if reading:
            reading[1] -= chunk
            if not reading[1]:
                writing.append([reading[0], steps[reading[0]]])
                reading = None
    return now, passes


@pytest.mark.parametrize("arrive", [False, True])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_it_is_the_naive_scheduler(width: int, arrive: bool) -> None:
    generator, times = np.random.default_rng(width), measured()
    arrivals = np.sort(generator.random(200)) * 30 * arrive
    lengths = Lengths(generator.integers(0, 1500, 200), generator.integers(1, 90, 200), arrivals)
    found = simulate(lengths, times, width=width, tokens_per_step=1.7)
    seconds, passes = naive(lengths, times.expected(width, 8), width, 1.7)
    assert found.seconds == pytest.approx(seconds, rel=1e-9)
    assert found.passes == passes
    assert found.tokens == lengths.answers.sum()
    assert (found.idle > 0) == arrive


def test_it_counts_the_passes_of_the_real_scheduler(tiny: str) -> None:
    engine = Engine.load(tiny, threads=1, dtype="fp32", drafter="none")
    generator = np.random.default_rng(0)
    asked = [("x" * int(generator.integers(1, 900)), int(generator.integers(1, 20))) for _ in range(25)]
    schedule, passes, prompts = Schedule(engine, 4), 0, []
    for text, tokens in asked:
        session = schedule.begin(text, {"max_new_tokens": tokens, "raw": True})
        prompts.append(len(session.tokens))  # type: ignore[union-attr]
    while schedule:
        schedule.step()
        passes += 1
    shared = sum(prompts) - len(prompts) - schedule.prefilled  # of common beginnings, which are read once
    found = simulate(
        Lengths(np.array(prompts), np.array([tokens for _, tokens in asked]), np.zeros(25)),
        measured(),
        width=4,
        tokens_per_step=1,
    )
    assert found.passes == pytest.approx(passes, rel=0.1 if shared else 0)


def test_times_are_those_measured_and_between_them_a_fit() -> None:
    times = PassTimes()
    for texts in (1, 2, 4, 16):
        times.add(texts, 0, 1000 * (0.01 + 0.002 * texts), 1000)
    times.add(3, 640, 0.5, 4)
    table = PassTimes.of(json.loads(json.dumps(times.report())), "it").expected(16, 10)
    assert [round(row[0], 4) for row in (table[1], table[9], table[16])] == [0.012, 0.028, 0.042]
    assert min(min(row) for row in table) > 0
    assert table[3][10] == pytest.approx(0.125, rel=0.01)
    for wrong in (None, [], [{"texts": 1}], [{"texts": 1, "prompt_tokens": 0, "passes": 1, "seconds": "nan"}]):
        with pytest.raises(UsageError, match="it has no pass"):
            PassTimes.of(wrong, "it")


def test_lengths_of_answers_and_of_lines(tmp_path: Path) -> None:
    lines = [
        {"id": 1, "index": 0, "usage": {"prompt_tokens": 70, "completion_tokens": 5, "cached_tokens": 60}},
        {"id": 2, "index": 1, "error": {"code": "failed", "message": "no"}},
        {"prompt_tokens": 7, "completion_tokens": 9, "arrival": 2.5},
    ]
    path = tmp_path / "lengths"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    found = Lengths.read(path)
    assert (found.prompts.tolist(), found.answers.tolist(), found.arrivals.tolist()) == ([10, 7], [5, 9], [0, 2.5])
    drawn = found.drawn(5)
    assert drawn.arrivals.tolist() == [0, 2.5, 5, 7.5, 10]
    path.write_text('{"prompt_tokens": 7}')
    with pytest.raises(UsageError, match=r"Line 1 of .* is no request"):
        Lengths.read(path)


def test_plan_forecasts_from_a_run(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = [{"id": i, "prompt": "x" * (10 + i), "max_new_tokens": 4 + i % 20} for i in range(40)]
    (home / "in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    run = ["batch", str(home / "in.jsonl"), "-o", str(home / "out"), "-m", tiny, "--threads", "1", "--batch-size", "4"]
    assert guarded([*run, "--summary", str(home / "run.json")]) == 0
    capfd.readouterr()
    plan = ["plan", "-m", tiny, "--texts", "1e4", "--measured", str(home / "run.json"), "--lengths", str(home / "out")]
    assert guarded([*plan, "--nodes", "2", "--price", "3", "--json"]) == 0
    batch = json.loads(capfd.readouterr().out)["batch"]
    assert (batch["texts"], batch["nodes"], batch["batch_size"]) == (10_000, 2, 4)
    assert batch["cost"] == pytest.approx(3 * batch["node_hours"])
    assert batch["saturates_at"] in (1, 2, 4)
    assert guarded(plan) == 0
    assert "10,000 texts on 1 node, 4 at a time" in capfd.readouterr().out
    for wrong, said in {
        ("--nodes", "2"): "give --texts N too",
        ("--texts", "5"): "needs what a run has measured",
    }.items():
        assert guarded(["plan", "-m", tiny, *wrong]) == 2
        assert said in capfd.readouterr().err
    (home / "run.json").write_text(
        '{"written": 0, "passes": [{"texts": 1, "prompt_tokens": 0, "passes": 1, "seconds": 1}]}'
    )
    assert guarded(plan) == 2
    assert "is no --summary" in capfd.readouterr().err
