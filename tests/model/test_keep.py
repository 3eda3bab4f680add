"""Matrices kept in 4 bits: the codes that loading makes, made once; bound to the files that they are of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.commands import inside
from support.letters import tokenizer_of
from support.native import SIZES, logits

from longspec.errors import UsageError
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.keep import keep, kept
from longspec.model.load import open_model
from longspec.model.weights.quantized import Piece, missing_kernel

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if (why := missing_kernel()) is not None:
        pytest.skip(why)
    made = write(oracle("llama", **SIZES), tmp_path / "model")
    tokenizer_of([chr(200 + i) for i in range(96)]).save(str(made / "tokenizer.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


def test_what_is_kept_is_what_loading_makes(folder: Path) -> None:
    checkpoint = Checkpoint("tiny", folder)
    assert kept(checkpoint) is None
    place = keep(checkpoint)
    assert kept(checkpoint) == place == keep(checkpoint)
    weight = checkpoint.weights(torch.bfloat16)[NAME]
    again = Checkpoint("kept", place)
    assert str(again.scheme()) == "compressed-tensors by 32, 4.5 bits a weight"
    weights = again.weights(torch.float32)
    assert torch.equal(weights[NAME], Piece.of_values(weight, "Q4_0").values())
    assert torch.equal(weights["lm_head.weight"], checkpoint.weights(torch.bfloat16)["lm_head.weight"].float())
    with pytest.raises(UsageError, match="holds compressed-tensors by 32"):
        keep(again)


def test_runs_in_4_bits_take_it(folder: Path) -> None:
    want = load(folder, torch.bfloat16, coded="Q4_0")
    if want.slow is not None:
        pytest.skip(want.slow)
    place = keep(Checkpoint("tiny", folder))
    opened = open_model(str(folder), dtype="int4")
    assert opened.checkpoint.folder == place
    assert open_model(str(folder), dtype="int8").checkpoint.folder == folder
    made = opened.load().decoder
    assert made.formats == want.formats
    assert torch.equal(logits(made, [30]), logits(want, [30]))


def test_other_files_have_none(folder: Path) -> None:
    keep(Checkpoint("tiny", folder))
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert kept(Checkpoint("tiny", folder)) is None


def test_pull_keeps_it_and_says_where(folder: Path, tmp_path: Path) -> None:
    done = inside(["pull", str(folder), "--dtype", "int4"], tmp_path)
    assert done.code == 0, done.err
    place = Path(done.out.decode().strip())
    assert (place / "config.json").is_file()
    assert place.parent.name == "int4"
    refused = inside(["pull", str(folder), "--dtype", "int8"], tmp_path)
    assert (refused.code, refused.out) == (2, b"")
    assert "on this machine already" in refused.err
    again = inside(["pull", str(place), "--dtype", "int4"], tmp_path)
    assert (again.code, again.out.decode().strip()) == (0, str(place))
    assert "nothing is kept" in again.err
