"""What a fork keeps of its parent's cache, what caches say that they can do, and the least that a cache needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.engines import engine, prompts, tiny
from torch import Tensor

from longspec.cache import BLOCK, CACHES, LOSSLESS, Bounds, Cache, Dense, Segment, Shape, Stage
from longspec.cache.codes import Codec
from longspec.cache.quantized import Quantized
from longspec.cache.snapshot import save
from longspec.cache.stage import Room
from longspec.cache.tree import Tree
from longspec.errors import LongspecError

SHAPE = Shape(2, 64, (None, None, None), torch.float32, torch.device("cpu"))
TEXT = prompts(1, 90)[0]


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


# --- what a cache can do, and what a new kind of cache needs


@pytest.mark.parametrize("name", CACHES)
def test_capabilities_are_values_that_hold(name: str) -> None:
    cache = CACHES[name](SHAPE)
    assert cache.lossless == (name in LOSSLESS)
    stage = cache.open()
    rows = stage.add(range(-1, 199))
    for layer in range(SHAPE.layers):
        keys = torch.randn(200, SHAPE.key_heads, SHAPE.head_dim)
        stage.put(layer, rows, keys, keys)
        list(stage.parts(layer, rows, torch.randn(200, 4, SHAPE.head_dim)))  # codes are made as rows ask for them
    cache.commit(stage, range(200))
    if cache.can_cut_anywhere:
        assert [cache.fork(length).length for length in (200, 131, 1)] == [200, 131, 1]
    else:
        assert cache.fork(40).length == 0
    for smaller in cache.can_become:
        codes, twin = CACHES[smaller](SHAPE), cache.fork(200)
        codes.take_rows(twin)
        assert codes.length == 200


class Plain(Cache):
    """The least that a cache needs: all rows of a layer in a list of tensors, each one [2, K, D], and no forks."""

    def __init__(self) -> None:
        self.length = 0
        self.rows: list[list[Tensor]] = [[] for _ in SHAPE.windows]

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for rows in self.rows for row in rows)

    def tensors(self) -> Iterator[Tensor]:
        return (row for rows in self.rows for row in rows)

    def open(self) -> PlainStage:
        return PlainStage(self)

    def commit(self, stage: PlainStage, rows: Sequence[int]) -> None:
        for layer, own in enumerate(self.rows):
            own += [stage.put_rows[layer][row] for row in rows]
        self.length += len(rows)

    def truncate(self, length: int) -> None:
        self.rows = [rows[:length] for rows in self.rows]
        self.length = length

    def fork(self, length: int) -> Plain:
        twin = Plain()
        twin.rows, twin.length = [rows[:length] for rows in self.rows], length
        return twin

    def room(self, rows: int) -> Room:
        return Room(rows * SHAPE.row_bytes)


class PlainStage(Stage):
    def __init__(self, cache: Plain) -> None:
        self.cache, self.length, self.tree = cache, cache.length, Tree()
        self.put_rows: list[dict[int, Tensor]] = [{} for _ in SHAPE.windows]

    @property
    def depths(self) -> Sequence[int]:
        return self.tree.depths

    def add(self, parents: Sequence[int]) -> slice:
        return self.tree.add(parents)

    def put(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        for i, row in enumerate(range(rows.start, rows.stop)):
            self.put_rows[layer][row] = torch.stack((keys[i], values[i]))

    def parts(self, layer: int, rows: slice, queries: Tensor) -> Iterator[Segment]:
        if self.cache.length:
            keys, values = torch.stack(self.cache.rows[layer], 2)
            yield Segment.dense(keys, values)
        first = torch.zeros(rows.stop - rows.start, dtype=torch.int64)
        bounds = Bounds(first, first + rows.stop, self.tree.ancestors(rows))
        keys, values = torch.stack([self.put_rows[layer][row] for row in range(rows.stop)], 2)
        yield Segment.dense(keys, values, bounds, self.length)


def test_a_new_kind_of_cache_needs_no_fast_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path, num_hidden_layers=SHAPE.layers)
    made = engine(model, "ngram")
    wanted = made.generate(TEXT, raw=True, max_new_tokens=20).tokens
    monkeypatch.setitem(CACHES, "dense", lambda shape: Plain())
    assert made.generate(TEXT, raw=True, max_new_tokens=20).tokens == wanted
    with pytest.raises(LongspecError, match="can't be kept in a file"):
        next(iter(Plain().state()))
