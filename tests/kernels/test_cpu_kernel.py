"""The C kernel of the CPU's attention against the reference in fp32; skipped where the processor has no tiles.

Weights are rounded to bf16 before they meet the values, and outputs are: both are off by 2^-9 at most, so that 1% of
the largest output is never reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from longspec.attention import attend, merge, reference
from longspec.attention import native as cpu
from longspec.attention.native_batch import Texts, reads
from longspec.cache.codes import Codec, DualCodec
from longspec.cache.dense import Dense, DenseStage
from longspec.cache.quantized import Quantized, QuantizedStage
from longspec.cache.stage import Bounds, Segment, Shape

TOLERANCE = 0.01

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).bfloat16()


def want(queries: Tensor, parts: Sequence[Segment], scale: float, softcap: float | None) -> Tensor:
    total = None
    for part in parts:
        for piece in part.pieces():
            wide = Segment.dense(piece.keys.float(), piece.values.float(), piece.bounds, piece.start)
            read = reference.read(queries.float(), wide, scale, softcap)
            total = read if total is None else merge(total, read)
    assert total is not None
    return total[0]


def check(queries: Tensor, parts: Sequence[Segment], softcap: float | None = None) -> None:
    scale = queries.shape[2] ** -0.5
    expected = want(queries, parts, scale, softcap)
    got = cpu.attend(queries, parts, scale, softcap).float()
    assert (got - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("dim", [32, 64, 96, 256])
@pytest.mark.parametrize("rows", [1, 2, 7, 21])
@pytest.mark.parametrize("columns", [1, 15, 16, 33, 511, 512, 513, 1300])
def test_one_part(dim: int, rows: int, columns: int) -> None:
    """In a buffer of larger capacity, as caches have it."""
    kv = randn(2, 3, columns + 50, dim)
    check(randn(rows, 9, dim, seed=1), [Segment.dense(kv[0, :, :columns], kv[1, :, :columns])])


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (16, 1)])
def test_groups_of_heads(heads: tuple[int, int]) -> None:
    kv = randn(2, heads[1], 600, 64)
    check(randn(3, heads[0], 64, seed=1), [Segment.dense(kv[0], kv[1])])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bounds_a_tree_and_several_parts(softcap: float | None) -> None:
    """Rows read ranges of their own, of the last columns what a mask says; one row reads nothing of the first part."""
    rows, columns = 9, 700
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(0, 600, (rows,), generator=generator)
    last = torch.full((rows,), columns)
    last[4] = first[4]
    tail = torch.rand(rows, 20, generator=generator) > 0.5
    kv, near = randn(2, 3, columns, 64), randn(2, 3, 70, 64, seed=2)
    square = Bounds(torch.zeros(rows, dtype=torch.int64), torch.arange(rows) + 62)
    parts = [Segment.dense(kv[0], kv[1], Bounds(first, last, tail)), Segment.dense(near[0], near[1], square)]
    check(randn(rows, 9, 64, seed=1), parts, softcap)
    check(randn(rows, 9, 64, seed=1), parts[::-1], softcap)


@pytest.mark.parametrize("size", [-200.0, 0.0, 3.0, 200.0])
def test_sinks_take_their_share(size: float) -> None:
    """Also where they are far below every score, or far above."""
    kv, queries = randn(2, 3, 700, 64), randn(5, 9, 64, seed=1)
    sinks = torch.randn(9, generator=torch.Generator().manual_seed(2)) + size
    parts = [Segment.dense(kv[0, :, :300], kv[1, :, :300]), Segment.dense(kv[0, :, 300:], kv[1, :, 300:], start=300)]
    wide = [Segment.dense(each.keys.float(), each.values.float()) for each in parts]
    expected = reference.sunk(*merge(*(reference.read(queries.float(), each, 0.125) for each in wide)), sinks)
    got = cpu.attend(queries, parts, 0.125, None, sinks).float()
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max() + 1e-30


@pytest.mark.parametrize("codec", [Codec(8, symmetric=True), Codec(8), Codec(4), Codec(2), DualCodec()], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_codes_are_read_as_they_decode(codec: Codec, dim: int) -> None:
    """Blocks out of the middle of a longer run, in several chunks, with bounds, and the upper plane of two."""
    blocks = randn(2, 3, 24, 64, dim)
    codes = tuple(each[:, 2:22] for each in codec.encode(blocks[0], blocks[1]))
    queries = randn(5, 9, dim, seed=1)
    bounds = Bounds(torch.tensor([0, 70, 600, 3, 64]), torch.tensor([1280, 1280, 601, 64, 1000]))
    for part in (Segment.coded(codec, codes, torch.bfloat16), Segment.coded(codec, codes, torch.bfloat16, bounds)):
        check(queries, [part])
        if isinstance(codec, DualCodec):
            upper, kept = codec.upper(part.tensors)
            check(queries, [Segment.coded(upper, kept, torch.bfloat16, part.bounds)])


def test_rows_and_threads_change_no_bit() -> None:
    kv, queries = randn(2, 3, 2000, 64), randn(16, 9, 64, seed=1)
    last = torch.arange(16) + 1985
    parts = [Segment.dense(kv[0], kv[1], Bounds(torch.zeros(16, dtype=torch.int64), last))]
    whole, before = cpu.attend(queries, parts, 0.125), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.attend(queries, parts, 0.125), whole)
    finally:
        torch.set_num_threads(before)
    for row in (0, 7, 15):
        alone = [Segment.dense(kv[0, :, : last[row]], kv[1, :, : last[row]])]
        assert torch.equal(cpu.attend(queries[row : row + 1], alone, 0.125), whole[row : row + 1])


def test_nothing_behind_a_part_is_read() -> None:
    """What stands there may be no number at all."""
    kv = randn(2, 3, 200, 64)
    kv[:, :, 77:] = float("nan")
    check(randn(2, 9, 64, seed=1), [Segment.dense(kv[0, :, :77], kv[1, :, :77])])


def test_what_it_refuses() -> None:
    for queries, why in (
        (torch.zeros(1, 9, 64), "bf16 on the CPU"),
        (randn(1, 9, 80), "up to 512 channels, not 80"),
    ):
        kv = randn(2, 3, 100, queries.shape[2])
        assert why in (cpu.refuses(queries, Segment.dense(kv[0], kv[1])) or "")
    kv = randn(2, 3, 100, 80)
    assert attend(randn(1, 9, 80), [Segment.dense(kv[0], kv[1])], 0.1).isfinite().all()  # torch takes it


class Rows(NamedTuple):
    stage: DenseStage | QuantizedStage
    staged: slice
    at: slice
    shift: int = 0


def grown(shape: Shape, length: int, seed: int, codec: Codec | None = None) -> Dense | Quantized:
    """A cache of so many rows."""
    cache = Dense(shape) if codec is None else Quantized(shape, codec)
    stage: Any = cache.open()
    rows = stage.add(range(-1, length - 1))
    for layer in range(shape.layers):
        stage.put(layer, rows, *randn(2, length, shape.key_heads, shape.head_dim, seed=seed + layer))
    cache.commit(stage, range(length))
    return cache


CODECS = [Codec(8, symmetric=True), Codec(4), Codec(2), DualCodec()]


@pytest.mark.parametrize("heads", [(9, 3), (4, 4)])
@pytest.mark.parametrize("windows", [(None, None), (40, None), (150, None)])
@pytest.mark.parametrize("codec", [None, *CODECS], ids=str)
def test_texts_in_one_call(heads: tuple[int, int], windows: tuple[int | None, ...], codec: Codec | None) -> None:
    """Bit for bit what each text's parts give one by one: forks, chains, trees, stages apart, of any length; coded, up
    to a block's border and over it.
    """
    queries, key_heads = heads
    shape = Shape(key_heads, 64, windows, torch.bfloat16, torch.device("cpu"))
    trunk = grown(shape, 130, 5, codec)
    lengths = (1, 700) if codec is None else (127, 703)
    caches: list[Any] = [
        *(grown(shape, n, n, codec) for n in lengths),
        trunk.fork(130),
        trunk.fork(64),
        grown(shape, 90, 3),
        trunk,
    ]
    parents = [[-1], [-1, 0, 1], [-1, 0, 0, 1, -1], [-1], list(range(-1, 39)), [-1, 0]]
    beside = [cache.open() for cache in caches[:3]]  # their later stages stand apart
    spans, count = [], 0
    for cache, each in zip(caches, parents, strict=True):
        stage = cache.open()
        spans.append(Rows(stage, stage.add(each), slice(count, count + len(each))))
        count += len(each)
    assert codec is None or any(run.is_coded for run in spans[1].stage.runs(1, spans[1].staged))
    assert all(reads(span) for span in spans)
    texts = Texts(spans, shape, queries, 0.125, None)
    for layer in range(shape.layers):
        made = randn(count, (queries + 2 * key_heads) * 64, seed=layer + 50)
        q, k, v = made.view(count, -1, 64).tensor_split((queries, queries + key_heads), 1)
        expected = []
        for span in spans:
            span.stage.put(layer, span.staged, k[span.at], v[span.at])
            expected.append(cpu.attend(q[span.at], span.stage.parts(layer, span.staged, q[span.at]), 0.125))
            span.stage.put(layer, span.staged, torch.zeros_like(k[span.at]), torch.zeros_like(v[span.at]))
        output = torch.empty(count, queries * 64, dtype=torch.bfloat16)
        texts.read(layer, made, output)
        for span, want in zip(spans, expected, strict=True):
            assert torch.equal(output[span.at], want.flatten(1))
    for cache, span in zip(caches, spans, strict=True):  # what was put can be kept
        cache.commit(span.stage, [0])
    del beside


def test_a_chunk_that_reads_its_own_codes_is_read_layer_by_layer() -> None:
    """What is coded while the layers run isn't known before: 512 rows behind 30, of which the later read the first."""
    shape = Shape(3, 64, (None, None), torch.bfloat16, torch.device("cpu"))
    cache = grown(shape, 30, 1, Codec(4))
    stage = cache.open()
    rows = stage.add(range(-1, 199))
    assert not reads(Rows(stage, rows, slice(0, 200)))
    for layer in range(shape.layers):
        stage.put(layer, rows, *randn(2, 200, 3, 64, seed=layer))
        made = randn(200, 9, 64, seed=layer + 9)
        expected = want(made, list(stage.parts(layer, rows, made)), 0.125, None)
        got = attend(made, stage.parts(layer, rows, made), 0.125).float()
        assert (got - expected).abs().max() < TOLERANCE * expected.abs().max()
