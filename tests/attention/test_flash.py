"""The flash-attn backend by a stand-in for the package: same signature, same answers, computed by the reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longspec import attention
from longspec.attention import backends, flash, merge, reference
from longspec.cache.codes import Codec
from longspec.cache.stage import Bounds, Segment


def flash_attn_with_kvcache(  # as in flash-attn 2.8
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, rotary_cos: Any = None,
    rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
    block_table: Any = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True,
    alibi_slopes: Any = None, num_splits: int = 0, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    """Queries [1, q, H, D] over keys and values [1, n, K, D]: output like the queries, log-sum-exp [1, H, q]."""
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert softmax_scale is not None
    rows, columns = q.shape[1], k_cache.shape[1]
    last = torch.arange(columns - rows + 1, columns + 1)  # aligned to the lower right corner
    bounds = Bounds(torch.zeros_like(last), last) if causal else None
    part = Segment.dense(k_cache[0].transpose(0, 1), v_cache[0].transpose(0, 1), bounds)
    output, lse = reference.read(q[0], part, softmax_scale, softcap or None)
    return (output.to(q.dtype)[None], lse.T[None]) if return_softmax_lse else output.to(q.dtype)[None]


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "find_spec", lambda name: sys.modules.get(name))
    monkeypatch.setattr(flash, "no_gpu", lambda: None)
    flash.missing.cache_clear()
    flash._kernel.cache_clear()
    yield module
    flash.missing.cache_clear()
    flash._kernel.cache_clear()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", [(1, 4, 4, 8, 1), (3, 6, 2, 16, 65), (17, 8, 1, 80, 200)])
def test_a_whole_part_and_a_causal_square(shape: tuple[int, ...], softcap: float | None) -> None:
    q, heads, key_heads, dim, n = shape
    queries, rows = torch.randn(q, heads, dim), torch.randn(2, key_heads, n + q, dim)
    prefix = Segment.dense(rows[0, :, :n], rows[1, :, :n])
    last = torch.arange(1, q + 1)
    square = Segment.dense(rows[0, :, n:], rows[1, :, n:], Bounds(torch.zeros_like(last), last, causal=True))
    for part in (prefix, square):
        got, want = flash.read(queries, part, 0.2, softcap), reference.read(queries, part, 0.2, softcap)
        assert got[0].shape == queries.shape
        assert got[1].shape == queries.shape[:2]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))
    together = merge(flash.read(queries, prefix, 0.2, softcap), flash.read(queries, square, 0.2, softcap))[0]
    whole = reference.read(
        queries, Segment.dense(rows[0], rows[1], Bounds(torch.zeros_like(last), last + n)), 0.2, softcap
    )[0]
    # A score that is off by its rounding moves the output by that, times what values differ by at most.
    largest = 0.2 * queries.norm(dim=-1).max() * rows[0].norm(dim=-1).max()
    assert (together - whole).abs().max() < torch.finfo(torch.float32).eps * largest * rows[1].abs().max()


def test_a_gpu_pass_is_given_to_it_where_it_can() -> None:
    """On tensors that say cuda and hold nothing."""
    with FakeTensorMode():
        queries = torch.empty(3, 32, 128, dtype=torch.bfloat16, device="cuda")
        rows = torch.empty(8, 640, 128, dtype=torch.bfloat16, device="cuda")
        bound = torch.zeros(3, dtype=torch.int64, device="cuda")
        for part in (Segment.dense(rows, rows), Segment.dense(rows, rows, Bounds(bound, bound, causal=True))):
            assert attention._backend(queries, part, None) is flash
            assert attention._backend(queries, part, 30.0) is flash
        own, codes, whole = (
            Segment.dense(rows, rows, Bounds(bound, bound)),
            Segment.coded(Codec(4), (), torch.bfloat16),
            Segment.dense(rows, rows),
        )
        assert flash.refuses(queries, own, None) == "each row reads columns of its own"
        assert flash.refuses(queries, codes, None) == "it reads dense rows only"
        assert flash.refuses(queries.float(), whole, None) == "it reads bf16 and fp16, not torch.float32"
        wide = torch.empty(3, 32, 264, dtype=torch.bfloat16, device="cuda")
        assert "not 264" in str(flash.refuses(wide, whole, None))
    assert flash.refuses(torch.empty(3, 32, 128), whole, None) == "the pass is not on a CUDA GPU"


def test_it_says_what_is_missing(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = flash.missing.__wrapped__  # not the answer that is kept
    assert found() is None
    package.flash_attn_with_kvcache = lambda q, k_cache, v_cache: None  # type: ignore[attr-defined]
    flash._kernel.cache_clear()
    assert found() == "the package flash-attn is older than 2.6"
    del package.flash_attn_with_kvcache
    flash._kernel.cache_clear()
    assert "can't be loaded" in str(found())
    monkeypatch.setattr(flash, "no_gpu", lambda: "torch finds no CUDA GPU")
    assert found() == "torch finds no CUDA GPU"
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    assert found() == "the package flash-attn isn't installed"


def test_all_backends_are_listed_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.triton, "missing", lambda: "the package triton isn't installed")
    assert [name for name, _, _ in backends()] == ["reference", "cpu", "flash", "triton"]
    usable = {name: (can, why) for name, can, why in backends()}
    assert usable["flash"][0]
    assert usable["triton"] == (False, "the package triton isn't installed")
    assert all(reason for _, _, reason in backends())
