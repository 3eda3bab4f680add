"""What a fork keeps of its parent's cache: the rows of its moment, whatever becomes of the parent afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longspec.cache import BLOCK, Dense, Shape
from longspec.cache.codes import Codec
from longspec.cache.quantized import Quantized
from longspec.cache.snapshot import save

SHAPE = Shape(2, 64, (None, None, None), torch.float32, torch.device("cpu"))


def grow(cache: Dense, rows: int, seed: int) -> None:
    """Commit random rows to all layers."""
    generator = torch.Generator().manual_seed(seed)
    stage = cache.open()
    staged = stage.add(range(-1, rows - 1))
    for layer in range(SHAPE.layers):
        keys, values = torch.randn(2, rows, SHAPE.key_heads, SHAPE.head_dim, generator=generator)
        stage.put(layer, staged, keys, values)
    cache.commit(stage, range(rows))


def all_rows(cache: Dense) -> list[Tensor]:
    return [cache.rows(layer).clone() for layer in range(SHAPE.layers)]


def test_a_fork_keeps_its_rows_when_its_parent_becomes_codes() -> None:
    parent = Dense(SHAPE)
    grow(parent, 130, seed=1)
    rows, fork = all_rows(parent), parent.fork(130)
    Quantized.of_dense(parent, Codec(4))
    assert all(torch.equal(kept, was) for kept, was in zip(all_rows(fork), rows, strict=True))


def test_a_fork_does_not_keep_what_its_parent_grew_to() -> None:
    parent = Dense(SHAPE)
    grow(parent, 130, seed=1)
    fork = parent.fork(130)
    before = fork.nbytes
    grow(parent, 20 * BLOCK, seed=2)
    assert fork.nbytes == before
    assert len(all_rows(fork)[0][0, 0]) == 130


def test_a_snapshot_names_every_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 tokens can't name the 0 rows"):
        save(tmp_path / "rows", {}, [7], Dense(SHAPE))
    assert not (tmp_path / "rows").exists()
