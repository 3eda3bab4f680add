"""`longspec bench batch` on a tiny model: all engines write alike, and a row says which length was best."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.commands import inside, write_tiny

from longspec.bench.batch import BatchWorkload
from longspec.bench.harness import Took
from longspec.engine.engine import Engine
from longspec.model.load import open_model

SUITE = [
    {"category": "sums", "turns": ["What is 7 and 8?"]},
    {"category": "tales", "turns": ["Tell me of the sea, the sea, the sea."]},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), 512)


def silent(stage: str, done: int, total: int) -> None:
    pass


def test_the_command(tiny: Path, tmp_path: Path) -> None:
    (suite := tmp_path / "suite.jsonl").write_text("".join(json.dumps(one) + "\n" for one in SUITE))
    output, plot = tmp_path / "batch.json", tmp_path / "batch.svg"
    arguments = ["bench", "batch", "-m", str(tiny), "--dtype", "fp32", "--suite", str(suite), "--drafter", "ngram"]
    few = ["--drafted", "3", "--rounds", "2", "--max-new-tokens", "8", "--output", str(output)]
    drawn = ["--plot", str(plot)] if find_spec("matplotlib") else []
    result = inside([*arguments, *few, *drawn], tmp_path)
    assert result.code == 0, result.err
    head, *lines, last = result.out.decode().splitlines()
    assert head.split() == ["texts", "0", "3", "auto", "best", "auto/best"]
    assert [line.split()[0] for line in lines] == ["1", "2"]  # there are two prompts
    report = json.loads(last)
    assert report == json.loads(output.read_text())
    assert (report["drafter"], report["prompts"], report["rounds"]) == (["ngram"], 2, 2)
    for row in report["results"]:
        assert row["tokens"] == {"0": 16, "3": 16, "auto": 16}
        assert row["different"] == {"0": 0, "3": 0, "auto": 0}
        assert row["best"] in (0, 3)
        assert row["tokens_per_step"]["0"] == 1
        assert row["auto_over_best"] > 0
        assert all(seconds > 0 for seconds in row["seconds"].values())
    assert not drawn or plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--texts", "3"], "has 2 such prompts, and 3 texts side by side were asked for"),
        (["--texts", "0"], "--texts"),
        (["--drafter", "wings"], "no drafter named 'wings'"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], said: str, tiny: Path, tmp_path: Path) -> None:
    (suite := tmp_path / "suite.jsonl").write_text("".join(json.dumps(one) + "\n" for one in SUITE))
    result = inside(["bench", "batch", "-m", str(tiny), "--suite", str(suite), *arguments], tmp_path)
    assert (result.code, result.out) == (2, b"")
    assert said in result.err


def test_a_ratio_is_that_of_a_round(tiny: Path) -> None:
    """The best length by its median; the control against that length, round by round."""
    model = open_model(str(tiny), dtype="fp32").load()
    plain = partial(Engine, model, drafter="none")
    workload = BatchWorkload({0: plain, 4: plain}, plain, ["one"], [1], 2, 3)
    workload._answers = {"0": [[1]], "4": [[2]], "auto": [[1]]}

    def round_of(*seconds: float) -> dict[str, Took]:
        return {name: Took(1, 10, took, steps=5) for name, took in zip(("0", "4", "auto"), seconds, strict=True)}

    row = workload._row(1, [round_of(2.0, 1.0, 1.0), round_of(4.0, 2.0, 4.0), round_of(1.0, 9.0, 9.0)])
    assert row["tokens_per_second"] == {"0": 5.0, "4": 5.0, "auto": 2.5}
    assert row["different"] == {"0": 0, "4": 1, "auto": 0}
    row = workload._row(2, [round_of(2.0, 1.0, 1.25), round_of(4.0, 2.0, 2.0), round_of(1.0, 9.0, 18.0)][:2])
    assert (row["best"], row["auto_over_best"]) == (4, 0.9)
