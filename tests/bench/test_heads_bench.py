"""`longspec bench heads` on a tiny model: a row for each head, whatever its kind."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from support.commands import inside, write_tiny
from support.heads import shaken

from longspec.bench.heads import interval
from longspec.heads import KINDS
from longspec.heads.format import save_head
from longspec.model.load import load_model

SUITE = [
    {"category": "sums", "turns": ["What is 7 and 8?"]},
    {"category": "tales", "turns": ["Tell me of the sea, the sea, the sea."]},
]


def test_an_interval_is_of_the_prompts_drawn_anew() -> None:
    assert interval([10, 20, 30], [5, 10, 15]) == [2.0, 2.0]
    low, high = interval([10, 60] * 20, [10, 20] * 20)
    assert 1.5 < low < 70 / 30 < high < 3
    assert interval([10, 60] * 20, [10, 20] * 20) == [low, high]


def test_the_command(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", 512)
    model = load_model(str(folder), dtype="fp32")
    for kind in sorted(KINDS):
        save_head(tmp_path / kind, shaken(kind, model, depth=3), model)
    (suite := tmp_path / "suite.jsonl").write_text("".join(json.dumps(one) + "\n" for one in SUITE))
    arguments = ["bench", "heads", *(str(tmp_path / kind) for kind in sorted(KINDS)), "-m", str(folder)]
    arguments += ["--suite", str(suite), "--max-new-tokens", "8", "--rounds", "1", "--output", str(tmp_path / "out")]
    drawn = ["--plot", str(tmp_path / "heads.svg")] if find_spec("matplotlib") else []
    result = inside([*arguments, *drawn], tmp_path)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out").read_text())
    assert json.loads(result.out.decode().splitlines()[-1]) == report
    assert [row["head"] for row in report["results"]] == sorted(KINDS)
    for row in report["results"]:
        outputs = len(row["reads"]) if row["head"] == "exits" else 3
        assert len(row["accuracy"]) == len(row["accuracy_among_3"]) == outputs
        assert all(one <= three for one, three in zip(row["accuracy"], row["accuracy_among_3"], strict=True))
        for steps in (row["tokens_per_step"], row["sampled_tokens_per_step"]):
            assert 1 <= steps["chain"] <= 4 + 1
            assert steps["tree"] >= 1
        for name, steps in row["tokens_per_step"].items():
            low, high = row["tokens_per_step_95"][name]
            assert low <= steps <= high
        assert all(ratio > 0 for ratio in row["ratio"].values())
        assert row["bytes_read"] > 2 * row["parameters"]
    counted = ["bench", "heads", str(tmp_path / "clover"), "-m", str(folder), "--suite", str(suite), "--dtype", "fp32"]
    counted += ["--max-new-tokens", "8", "--rounds", "0", "--output", str(tmp_path / "out")]
    assert inside(counted, tmp_path).code == 0
    report = json.loads((tmp_path / "out").read_text())
    assert report["dtypes"] == ["fp32"]
    assert [row["ratio"] for row in report["results"]] == [{}]
    refused = inside(["bench", "heads", str(tmp_path), "-m", str(folder), "--suite", str(suite)], tmp_path)
    assert refused.code == 2
    assert "can't be read" in refused.err
