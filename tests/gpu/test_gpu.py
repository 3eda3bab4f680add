"""Attention on hardware: what test_triton.py and test_flash.py hold, on Llama-3-8B's heads and lengths.

No hardware has run these yet: they were written on a machine without a GPU, where they are skipped.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longspec.attention import attend, flash, merge, reference, triton
from longspec.cache.codes import Codec, DualCodec
from longspec.cache.stage import BLOCK, Bounds, Segment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU"),
]

HEADS, KEY_HEADS, DIM, SCALE = 32, 8, 128, 128**-0.5
ROWS = [1, 3, 8, 17, 64]
PREFIXES = [1024, 8192 + 17, 128 * 1024]
CODECS = {"int8": Codec(8, symmetric=True), "int4": Codec(4), "int2": Codec(2), "dual": DualCodec()}

# Rounding to bf16 is 2^-9 of a weight, a query or a value of size 1 to 4; the log-sum-exp of dense rows is in fp32.
OUTPUT, LSE = 1e-2, 1e-4
CODED_OUTPUT, CODED_LSE = 3e-2, 3e-2


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, device="cuda", generator=torch.Generator("cuda").manual_seed(seed + sum(size)))


def queries(q: int) -> Tensor:
    return normal(q, HEADS, DIM, seed=1).bfloat16()


def tree(q: int, n: int) -> Bounds:
    """All columns but the last q, and of those a row's random ancestors and itself."""
    ancestors = torch.rand(q, q, generator=torch.Generator().manual_seed(q)) < 0.5
    ancestors = (ancestors.tril() | torch.eye(q, dtype=torch.bool)).cuda()
    return Bounds(torch.zeros(q, dtype=torch.int64).cuda(), torch.full((q,), n).cuda(), ancestors)


def dense(q: int, n: int, bounds: Bounds | None = None) -> Segment:
    keys, values = normal(2, KEY_HEADS, n + q, DIM).bfloat16()[:, :, :n]
    return Segment.dense(keys, values, bounds)


def coded(codec: Codec, n: int, bounds: Bounds | None = None) -> Segment:
    keys, values = normal(2, KEY_HEADS, n // BLOCK, BLOCK, DIM)
    return Segment.coded(codec, codec.encode(keys + 2 * normal(KEY_HEADS, 1, 1, DIM), values), torch.bfloat16, bounds)


def naive(rows: Tensor, part: Segment) -> tuple[Tensor, Tensor]:
    """In fp32 over pieces of 1,024 columns, codes at their own values."""
    if part.is_coded:
        pieces = list(replace(part, dtype=torch.float32).pieces())
    else:
        pieces = [part.cut(at, min(at + 1024, part.columns)) for at in range(0, part.columns, 1024)]
    total = reference.read(rows.float(), pieces[0], SCALE)
    for piece in pieces[1:]:
        total = merge(total, reference.read(rows.float(), piece, SCALE))
    return total


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], output: float, lse: float) -> None:
    nothing = want[1] == float("-inf")
    assert torch.equal(got[1] == float("-inf"), nothing)
    assert (got[0].float() - want[0]).masked_fill(nothing[..., None], 0.0).abs().max() < output
    assert (got[1] - want[1]).masked_fill(nothing, 0.0).abs().max() < lse


def need(backend: object) -> None:
    if (why := backend.missing()) is not None:  # type: ignore[attr-defined]
        pytest.skip(why)


@pytest.mark.parametrize("n", PREFIXES)
@pytest.mark.parametrize("q", ROWS)
def test_triton_reads_trees(q: int, n: int) -> None:
    need(triton)
    part = dense(q, n, tree(q, n))
    check(triton.read(queries(q), part, SCALE), naive(queries(q), part), OUTPUT, LSE)


@pytest.mark.parametrize("n", PREFIXES)
@pytest.mark.parametrize("q", ROWS)
@pytest.mark.parametrize("codec", CODECS)
def test_triton_reads_codes(codec: str, q: int, n: int) -> None:
    need(triton)
    n = n // BLOCK * BLOCK
    own = torch.arange(q, device="cuda") * BLOCK  # each row begins a block further on, and the first reads nothing
    for bounds in (None, Bounds(own, torch.where(own > 0, n, 0))):
        part = coded(CODECS[codec], n, bounds)
        check(triton.read(queries(q), part, SCALE), naive(queries(q), part), CODED_OUTPUT, CODED_LSE)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_reads_all_dtypes_and_head_dimensions(dtype: torch.dtype, dim: int) -> None:
    need(triton)
    rows = normal(5, 4, dim).to(dtype)
    keys, values = normal(2, 2, 320, dim)
    last = torch.tensor([1, 65, 319, 320, 0]).cuda()
    bounds = Bounds(torch.zeros_like(last), last)
    exact = dtype == torch.float32
    for softcap in (None, 20.0):
        part = Segment.dense(keys.to(dtype), values.to(dtype), bounds)
        want = reference.read(rows, part, 0.1, softcap)
        check(triton.read(rows, part, 0.1, softcap), want, 1e-5 if exact else OUTPUT, 1e-5 if exact else LSE)
        for codec in CODECS.values():
            codes = codec.encode(keys.unflatten(1, (-1, BLOCK)), values.unflatten(1, (-1, BLOCK)))
            (piece,) = Segment.coded(codec, codes, torch.float32, bounds).pieces()
            want = reference.read(rows.float(), piece, 0.1, softcap)
            got = triton.read(rows, Segment.coded(codec, codes, dtype, bounds), 0.1, softcap)
            check(got, want, 1e-4 if exact else CODED_OUTPUT, 1e-4 if exact else CODED_LSE)


@pytest.mark.parametrize("n", PREFIXES)
@pytest.mark.parametrize("q", ROWS)
def test_torchs_flash_kernel_gives_the_log_sum_exp(q: int, n: int) -> None:
    part = dense(q, n)
    if not reference.has_flash(queries(q), part, None):
        pytest.skip(str(reference.no_gpu()))
    check(reference.read_flash(queries(q), part, SCALE), naive(queries(q), part), OUTPUT, LSE)


@pytest.mark.parametrize("n", PREFIXES)
@pytest.mark.parametrize("q", ROWS)
def test_flash_reads_prefixes(q: int, n: int) -> None:
    need(flash)
    part = dense(q, n)
    check(flash.read(queries(q), part, SCALE), naive(queries(q), part), OUTPUT, LSE)


def test_flash_reads_a_causal_square() -> None:
    need(flash)
    last = torch.arange(1, 301, device="cuda")
    part = dense(0, 300, Bounds(torch.zeros_like(last), last, causal=True))
    check(flash.read(queries(300), part, SCALE), naive(queries(300), part), OUTPUT, LSE)


@pytest.mark.parametrize("kind", ["dense", *CODECS])
@pytest.mark.parametrize("q", ROWS)
def test_attention_over_a_prefix_and_a_tree(q: int, kind: str) -> None:
    """Through `attend`, which chooses the backends."""
    prefix = dense(0, 8192) if kind == "dense" else coded(CODECS[kind], 8192)
    near = dense(q, 100 + q, tree(q, 100 + q))
    want = merge(naive(queries(q), prefix), naive(queries(q), near))[0]
    got = attend(queries(q), [prefix, near], SCALE)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < CODED_OUTPUT
