"""What a token reads, and the tokens per second that this makes: the memory's rate, forecasts, what commands say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.commands import share_kernels, write_tiny

from longspec.cli.main import guarded
from longspec.control import latency
from longspec.machine import bandwidth
from longspec.memory.forecast import REACHED, Forecast, forecast
from longspec.memory.plan import choice, request_of
from longspec.model.config import Config
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.load import open_model
from longspec.model.mixtures import Mixture
from longspec.model.reads import Reads, rows_read
from longspec.model.weights.footprint import estimated, footprint

MIB = 1 << 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rates of this machine are neither read nor written."""
    share_kernels(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bandwidth, "_SECONDS", 0.01)
    monkeypatch.setattr(bandwidth, "_NBYTES", MIB)
    return tmp_path / "cache" / "longspec"


def test_the_memorys_rate_is_measured_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bandwidth.kept_rate()
    assert first is not None
    assert 1e6 < first < 1e13
    (path,) = (own_cache / "bandwidth").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(bandwidth, "memory_rate", lambda: pytest.fail("it was measured again"))
        assert bandwidth.kept_rate() == pytest.approx(first, abs=1)
    for wrong in ("", "[]", "{}", '{"bytes_per_second": "many"}', '{"bytes_per_second": -1}'):
        path.write_text(wrong)
        assert bandwidth.kept_rate() != -1
        assert json.loads(path.read_text())["bytes_per_second"] > 1e6
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: 3 * MIB)
    path.unlink()
    assert bandwidth.kept_rate() is None


def test_a_pass_takes_as_long_as_its_slower_reading() -> None:
    mixture = Mixture(8, 2, 16, (True,))
    reads = Reads(1000, 100.0, mixture)
    dense = Forecast(Reads(1000), 200, 0, 0, 1e4 / REACHED, None)
    assert dense.bytes_per_token == 1200
    assert dense.seconds(1) == dense.seconds(8) == pytest.approx(0.12)
    mixed = Forecast(reads, 0, 0, 0, 1e4 / REACHED, None)
    assert mixed.seconds(1) == pytest.approx(0.12)
    assert mixed.seconds(2) == pytest.approx(0.1 + 0.01 * mixture.union(2))
    streamed = replace(mixed, streamed=500, disk_rate=1e3)
    assert streamed.seconds(1) == pytest.approx(0.5)
    assert replace(dense, memory_rate=None).seconds(1) is None
    assert replace(streamed, disk_rate=None).report()["tokens_per_second"] is None
    assert [one["experts"] for one in mixed.report()["union"]] == [2.0, 3.5, 5.5, 7.2, 7.9]
    assert dense.report()["union"] is None


@pytest.mark.parametrize("family", ["llama", "gemma4", "qwen2", "olmoe", "qwen3_5_moe", "gemma4_moe", "lfm2", "ouro"])
def test_what_a_pass_reads_is_known_before_weights_are(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint("a", write(oracle(family), tmp_path))
    config, decoder = Config.read(checkpoint.config()), load(tmp_path)
    told = footprint(checkpoint, config, torch.float32).reads
    for rows in (1, 3, 50):
        assert told.by_rows(rows) == pytest.approx(decoder.touched(rows), abs=2)
    if family in ("llama", "qwen2", "olmoe"):
        tied = bool(checkpoint.config().get("tie_word_embeddings"))
        assert estimated(config, decoder.nbytes, tied=tied).by_rows(3) == pytest.approx(decoder.touched(3), rel=0.05)


def test_a_window_reads_no_more_than_its_rows(tmp_path: Path) -> None:
    shape = load(write(oracle("mistral"), tmp_path)).shape
    assert rows_read(shape, 10) == 10 * shape.row_bytes
    assert rows_read(shape, 500) == 24 * shape.row_bytes


def test_codes_of_a_cache_are_less_to_read(tmp_path: Path) -> None:
    request = request_of(open_model(str(write_tiny(tmp_path, 500)), dtype="fp32", device="cpu"), 500)
    dense, int4 = (forecast(request, choice(request, name, 64), 1e9) for name in ("dense", "int4"))
    assert dense.cache == 500 * request.shape.row_bytes
    assert int4.cache < 0.7 * dense.cache
    assert dense.reads == int4.reads


def said(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> Any:
    assert guarded(["plan", *arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_plan_says_what_a_token_reads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "model", 500)
    given = ["-m", str(folder), "--dtype", "fp32", "--device", "cpu", "--memory", "16GiB"]
    report = said(given, capfd)["reads"]
    assert report["bytes_per_token"] == report["weights_bytes"] + report["cache_bytes"]
    assert report["tokens_per_second"] > 1
    assert report["union"] is report["measured_tokens_per_second"] is None
    config = Config.read(json.loads((folder / "config.json").read_text()))
    path = latency.costs_file(config, "fp32", "cpu", torch.get_num_threads(), strict=False, streamed=None)
    latency.write(path, {"passes": [(1, 0.05), (8, 0.06)]})
    assert said(given, capfd)["reads"]["measured_tokens_per_second"] == pytest.approx(20)
    assert guarded(["plan", *given]) == 0
    out = capfd.readouterr().out
    assert "A token behind 500 others reads" in out
    assert "GB/s that memory is read at here (20 in earlier runs)." in out


def test_plan_says_the_union_of_a_mixture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "model", 500)
    write(oracle("olmoe", max_position_embeddings=500), folder)
    given = ["-m", str(folder), "--dtype", "fp32", "--device", "cpu"]
    report = said(given, capfd)["reads"]
    assert [one["rows"] for one in report["union"]] == [1, 2, 4, 8, 16]
    assert report["union"][0]["bytes"] == pytest.approx(report["weights_bytes"], abs=1)
    assert guarded(["plan", *given]) == 0
    assert "the experts of 6 that they read if they choose at random: 1: 3 (" in capfd.readouterr().out


def test_doctor_says_how_fast_memory_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    assert guarded(["doctor", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["machine"]["memory_read_mb_per_second"] >= 1
