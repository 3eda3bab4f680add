"""The Triton kernels against their naive forms: on a GPU where there is one, else through Triton's interpreter.

What the interpreter can't say, a compiler can: the last tests compile the kernels for GPUs that aren't here.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

TESTS = str(Path(__file__).parents[1])
HERE = "cuda" if torch.cuda.is_available() else "cpu"
if HERE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for good: all modules are imported before a test

from longspec import attention  # noqa: E402
from longspec.attention import attend, flash, merge, reference, triton  # noqa: E402
from longspec.cache.codes import Codec, DualCodec  # noqa: E402
from longspec.cache.quantized import Quantized  # noqa: E402
from longspec.cache.stage import BLOCK, Bounds, Segment, Shape  # noqa: E402

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton isn't installed")

SHAPES = [  # rows, query heads, key heads, head dimension, columns: odd ones first
    (1, 1, 1, 8, 1),
    (3, 4, 1, 80, 63),
    (17, 2, 2, 64, 65),
    (3, 6, 2, 8, 200),
    (17, 3, 1, 80, 65),
    (1, 6, 2, 128, 200),
    (2, 2, 2, 256, 70),
]
CODED_SHAPES = [(1, 1, 1, 8, 1), (3, 3, 1, 80, 2), (17, 2, 2, 64, 2), (1, 4, 2, 64, 3), (2, 2, 1, 256, 1)]  # blocks
CODECS = {
    "int8": Codec(8, symmetric=True),
    "uint8": Codec(8),
    "int4": Codec(4),
    "int2": Codec(2),
    "dual": DualCodec(),
}

# Outputs are means of values of size 1. In half precision the kernels round weights to the dtype (the interpreter cuts
# them off: 2^-7 in bf16), in codes the scaled queries too; fp32 differs by the order of its sums.
OUTPUT = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LSE = 4e-6
CODED_OUTPUT = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}  # fp16 is multiplied as bf16
CODED_LSE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def naive(queries: Tensor, part: Segment, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """The reference over the part's pieces."""
    results = [reference.read(queries, piece, scale, softcap) for piece in part.pieces()]
    total = results[0]
    for result in results[1:]:
        total = merge(total, result)
    return total


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


def bounded(q: int, n: int, kind: str) -> Bounds | None:
    """Rows that read all, from and to columns of their own (some read nothing), or a tree behind those."""
    if kind == "whole":
        return None
    generator = torch.Generator().manual_seed(q * n)
    first, last = torch.randint(0, n, (q,), generator=generator), torch.randint(1, n + 1, (q,), generator=generator)
    tail = torch.rand(q, 1 + n // 3, generator=generator) < 0.5
    if kind == "tree":
        first, last = first // 2, torch.full_like(last, n)
    return Bounds(first.to(HERE), last.to(HERE), tail.to(HERE) if kind == "tree" else None)


def dense_part(key_heads: int, n: int, dim: int, dtype: torch.dtype, bounds: Bounds | None) -> Segment:
    keys, values = normal(2, key_heads, n, dim).to(HERE, dtype)
    return Segment.dense(keys, values, bounds)


def coded_part(
    codec: Codec, key_heads: int, blocks: int, dim: int, dtype: torch.dtype, bounds: Bounds | None
) -> Segment:
    """Blocks 1.. of a larger buffer, of rows that aren't centred: some channels are always large."""
    rows = normal(2, key_heads, blocks + 2, BLOCK, dim) + 2 * normal(2, key_heads, 1, 1, dim)
    codes = tuple(each[:, 1:-1].to(HERE) for each in codec.encode(*rows))
    return Segment.coded(codec, codes, dtype, bounds)


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], output: float, lse: float) -> None:
    nothing = want[1] == float("-inf")
    assert torch.equal(got[1] == float("-inf"), nothing)
    assert bool((got[0][nothing] == 0).all())
    assert (got[0].float() - want[0]).abs().max() < output
    assert ((got[1] - want[1]).masked_fill(nothing, 0.0)).abs().max() < lse


@pytest.mark.parametrize("kind", ["whole", "own", "tree"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape: tuple[int, ...], kind: str) -> None:
    q, heads, key_heads, dim, n = shape
    part = dense_part(key_heads, n, dim, torch.float32, bounded(q, n, kind))
    queries = normal(q, heads, dim, seed=1).to(HERE)
    for softcap in (None, 3.0):
        got = triton.read(queries, part, dim**-0.5, softcap)
        check(got, naive(queries, part, dim**-0.5, softcap), OUTPUT[torch.float32], LSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]])
def test_dense_in_half_precision(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, heads, key_heads, dim, n = shape
    part = dense_part(key_heads, n, dim, dtype, bounded(q, n, "tree"))
    queries = normal(q, heads, dim, seed=1).to(HERE, dtype)
    check(triton.read(queries, part, dim**-0.5), naive(queries, part, dim**-0.5), OUTPUT[dtype], LSE)


def test_strides_are_any() -> None:
    """Rows before heads, a part that begins inside a buffer, queries cut out of a larger projection."""
    keys, values = normal(2, 90, 3, 16).to(HERE)
    part = Segment.dense(keys.transpose(0, 1)[:, 7:], values.transpose(0, 1)[:, 7:], bounded(2, 83, "tree"))
    queries = normal(5, 9, 16).to(HERE)[1:3, 3:]
    check(triton.read(queries, part, 0.25), naive(queries, part, 0.25), OUTPUT[torch.float32], LSE)


@pytest.mark.parametrize("kind", ["whole", "own", "tree"])
@pytest.mark.parametrize("codec", CODECS)
def test_codes(codec: str, kind: str) -> None:
    for q, heads, key_heads, dim, blocks in CODED_SHAPES:
        part = coded_part(CODECS[codec], key_heads, blocks, dim, torch.float32, bounded(q, blocks * BLOCK, kind))
        queries = normal(q, heads, dim, seed=1).to(HERE)
        softcap = 3.0 if q == 3 else None
        got = triton.read(queries, part, dim**-0.5, softcap)
        want = naive(queries, part, dim**-0.5, softcap)
        check(got, want, CODED_OUTPUT[torch.float32], CODED_LSE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", CODECS)
def test_codes_in_half_precision(codec: str, dtype: torch.dtype) -> None:
    """Against the codes' own values in fp32: decoded to bf16 first, as the naive form has it, they are no nearer."""
    q, heads, key_heads, dim, blocks = CODED_SHAPES[1]
    part = coded_part(CODECS[codec], key_heads, blocks, dim, dtype, bounded(q, blocks * BLOCK, "own"))
    exact = replace(part, dtype=torch.float32)
    queries = normal(q, heads, dim, seed=1).to(HERE, dtype)
    want = naive(queries.float(), exact, dim**-0.5)
    check(triton.read(queries, part, dim**-0.5), want, CODED_OUTPUT[dtype], CODED_LSE[dtype])


def test_small_weights_survive_small_scales_in_fp16() -> None:
    """One row takes nearly all attention, and 191 of weight 1e-5 have values with steps below what fp16 holds."""
    keys, values = torch.zeros(2, 1, 3, BLOCK, 16).unbind(0)
    keys[0, 0, 0] = math.log(1e5) / 16
    values[:] = 1e-4 * normal(1, 3, BLOCK, 16)
    values[0, 0, 0] = 0
    codec = Codec(4)
    codes = tuple(each.to(HERE) for each in codec.encode(keys, values))
    queries = torch.ones(1, 1, 16, dtype=torch.float16, device=HERE)
    want = naive(queries.float(), Segment.coded(codec, codes, torch.float32), 1.0)[0]
    got = triton.read(queries, Segment.coded(codec, codes, torch.float16), 1.0)[0]
    assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_an_upper_plane_is_read_in_place() -> None:
    """A drafter's view of dual codes: the plane lies in the cache's buffer, its scales in tensors of their own."""
    dual = coded_part(CODECS["dual"], 3, 2, 64, torch.float32, None)
    assert isinstance(dual.codec, DualCodec)
    codec, codes = dual.codec.upper(dual.tensors)
    part = Segment.coded(codec, codes, torch.float32)
    queries = normal(2, 9, 64).to(HERE)
    check(triton.read(queries, part, 0.125), naive(queries, part, 0.125), 2e-5, 1e-5)


@pytest.mark.parametrize("processors", [1, 1000])
def test_chunks_change_nothing(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_processors", lambda device: processors)
    part = dense_part(1, 1300, 16, torch.float32, bounded(2, 1300, "tree"))
    queries = normal(2, 2, 16).to(HERE)
    check(triton.read(queries, part, 0.25), naive(queries, part, 0.25), OUTPUT[torch.float32], LSE)


def test_chunks_are_whole_blocks_and_few() -> None:
    for n in (1, 63, 64, 65, 200, 7000, 128 * 1024):
        for programs in (1, 8, 300):
            chunk = triton._chunk(n, programs, 132)
            chunks = -(-n // chunk)
            assert chunk % BLOCK == 0
            assert 1 <= chunks <= min(128, max(1, 264 // programs))


def test_a_quantized_cache_is_read_as_by_the_reference() -> None:
    cache = Quantized(Shape(3, 16, (None,), torch.float32, torch.device(HERE)), Codec(4))
    stage = cache.open()
    rows = stage.add(range(-1, 299))
    stage.put(0, rows, *normal(2, 300, 3, 16).to(HERE))
    list(stage.parts(0, rows, torch.empty(300, 6, 16)))  # codes are made as rows ask for them
    cache.commit(stage, range(300))
    stage = cache.open()
    rows = stage.add([-1, 0, 0, 1])
    stage.put(0, rows, *normal(2, 4, 3, 16, seed=1).to(HERE))
    queries = normal(4, 6, 16).to(HERE)
    parts: list[Segment] = list(stage.parts(0, rows, queries))
    assert [part.is_coded for part in parts] == [True, False]
    got = merge(*(triton.read(queries, part, 0.25) for part in parts))[0]
    assert (got - attend(queries, parts, 0.25)).abs().max() < 2e-5


def test_a_gpu_pass_is_given_to_it_where_it_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that say cuda and hold nothing: not a whole part in bf16, which flash kernels read."""
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(flash, "missing", lambda: "the package flash-attn isn't installed")
    monkeypatch.setattr(reference, "no_gpu", lambda: None)
    with FakeTensorMode():
        bound = torch.zeros(3, dtype=torch.int64, device="cuda")
        rows = torch.empty(8, 640, 128, dtype=torch.bfloat16, device="cuda")
        whole, own = Segment.dense(rows, rows), Segment.dense(rows, rows, Bounds(bound, bound))
        codec = Codec(4)
        empty = codec.empty(Shape(8, 128, (None,), torch.bfloat16, torch.device("cuda")), 10)
        queries = torch.empty(3, 32, 128, dtype=torch.bfloat16, device="cuda")
        for part in (own, Segment.coded(codec, empty, torch.bfloat16)):
            assert attention._backend(queries, part, None) is triton
        assert attention._backend(queries, whole, 30.0) is triton
        assert attention._backend(queries.float(), Segment.dense(rows.float(), rows.float()), None) is triton
        assert attention._backend(queries, whole, None) is None
        assert reference.has_flash(queries, whole, None)
        output, lse = reference.read_flash(queries, whole, 0.1)
        assert (output.shape, output.dtype) == (queries.shape, torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((3, 32), torch.float32)


def test_it_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    part = dense_part(1, 3, 16, torch.float32, None)
    assert triton.refuses(torch.empty(1, 1, 16), part, None) == "the pass is not on a CUDA GPU"
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    found = triton.missing.__wrapped__  # not the answer that is kept
    assert found() == "the package triton isn't installed"
    monkeypatch.setattr(triton, "find_spec", lambda name: name)
    monkeypatch.setattr(triton, "no_gpu", lambda: "torch finds no CUDA GPU")
    assert found() == "torch finds no CUDA GPU"
    monkeypatch.setattr(triton, "no_gpu", lambda: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "C compiler" in str(found())
    monkeypatch.setenv("CC", "cc")
    assert found() is None


COMPILED = """
import sys
import torch
from support.compiled import targets
from longspec.attention import triton_kernels as kernels
from longspec.attention.triton import read
from longspec.cache.codes import Codec, DualCodec
from longspec.cache.stage import BLOCK, Bounds, Segment

zeros = torch.zeros(16, dtype=torch.int64)
KINDS = [
    (torch.bfloat16, 16, 128, None), (torch.float32, 16, 256, None), (torch.bfloat16, 16, 128, Codec(4)),
    (torch.float16, 1, 256, DualCodec()), (torch.bfloat16, 1, 128, None),
    (torch.bfloat16, 1, 128, Codec(8, symmetric=True)), (torch.bfloat16, 1, 64, Codec(2)),
]
capability, kinds = map(int, sys.argv[1:])
for made in targets(kernels, ("dense", "coded", "joined"), [capability]):
    for dtype, q, dim, codec in KINDS[:kinds]:
        bounds = Bounds(zeros[:q], zeros[:q], torch.ones(q, 5, dtype=torch.bool))
        rows = torch.zeros(2, 8, 2, BLOCK, dim, dtype=dtype)
        if codec is None:
            part = Segment.dense(*rows.flatten(2, 3), bounds)
        else:
            part = Segment.coded(codec, codec.encode(*rows), dtype, bounds)
        read(torch.zeros(q, 32, dim, dtype=dtype), part, 0.1)
    print(max(kernel.metadata.shared for _, kernel in made))
"""


@pytest.mark.parametrize(
    ("capability", "most", "kinds"),
    [(89, 99, 4), *(pytest.param(*each, 7, marks=pytest.mark.full) for each in ((89, 99), (90, 227)))],
)
def test_kernels_compile_for_gpus_that_are_not_here(capability: int, most: int, kinds: int, tmp_path: Path) -> None:
    """What they share of a processor's memory fits its KiB: compute capability 8.9 has the least, and the first four
    kinds take the most.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "PYTHONPATH": TESTS}
    command = [sys.executable, "-c", COMPILED, str(capability), str(kinds)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert 0 < int(result.stdout) <= most * 1024
