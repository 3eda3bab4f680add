"""Backend on our own Triton kernels: quantized segments without dequantizing to memory, and segments with per-query
bounds.

Takes and gives the same as `reference.read`. It decides how a segment is split among a GPU's processors, and knows
nothing of the arithmetic in the kernels (`longspec.attention.triton_kernels`).

No hardware has run this yet: kernels and launches are tested through Triton's interpreter, and compiled for compute
capabilities 8.9 and 9.0 (`tests/attention/test_triton.py`). `tests/gpu` holds the comparisons that wait for a GPU,
and the tile sizes here wait for `docs/benchmarks/gpu_attention.py`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from longspec.attention.reference import no_gpu
from longspec.cache.codes import Codec, DualCodec, GroupCodec
from longspec.cache.stage import BLOCK, Segment

__all__ = [
    "MOST_CHUNKS",
    "OPTIONS",
    "USE",
    "all_of",
    "kind_of",
    "missing",
    "most_chunks",
    "power_of_2",
    "read",
    "refuses",
    "score_factors",
    "tile",
]

USE = "quantized caches and draft trees on the GPU"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHUNKS = 128  # as in longspec.attention.triton_kernels
_LOG2E = 1.4426950408889634

OPTIONS = {"enable_fp_fusion": True}  # triton 3.9 warns where this isn't set

_Arguments = tuple[str, list[Tensor], list[int], dict[str, Any]]
"""A kernel's name, its tensors between the queries and the bounds, their strides, and its own constants."""


@cache
def missing() -> str | None:
    """The reason why this machine can't run it; None where it can."""
    if find_spec("triton") is None:
        return "the package triton isn't installed"
    if (why := no_gpu()) is not None:
        return why
    if sys.platform == "linux" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler and finds none: install gcc or clang, or name one in the environment as CC"
    return None


def refuses(queries: Tensor, part: Segment, softcap: float | None) -> str | None:
    """The reason why it can't attend from these queries to this segment; None where it can."""
    if queries.device.type != "cuda":
        return "the pass is not on a CUDA GPU"
    if (why := missing()) is not None:
        return why
    if queries.dtype not in _DTYPES or queries.shape[-1] > 256:
        return "it reads heads of at most 256 channels in fp32, bf16 or fp16"
    if part.is_coded:
        known = isinstance(part.codec, Codec) and not isinstance(part.codec, GroupCodec) and part.chosen is None
        return None if known else "it doesn't know these codes"
    if part.bounds is None and softcap is None and queries.dtype != torch.float32:
        return "a whole part in half precision is left to flash attention"
    return None


def read(queries: Tensor, part: Segment, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of queries [q, H, D] over one segment: output [q, H, D] and log-sum-exp [q, H], both fp32.

    A query without allowed columns gives zeros and -inf. CPU tensors are for Triton's interpreter
    (TRITON_INTERPRET=1).
    """
    from longspec.attention import triton_kernels as kernels  # imports triton, which may be missing

    q, heads, dim = queries.shape
    coded = part.is_coded
    key_heads, n = part.key_heads, part.columns
    rows = heads // key_heads * q
    own = tile(rows, dim, queries.dtype, coded)
    tiles = -(-rows // own["M"])
    chunk = _chunk(n, tiles * key_heads, _processors(queries.device))
    chunks = -(-n // chunk)
    outputs = queries.new_empty(chunks, q, heads, dim, dtype=torch.float32)
    lses = queries.new_empty(chunks, q, heads, dtype=torch.float32)

    queries = _contiguous_in_dim(queries)
    bounds = part.bounds
    first, last = (queries, queries) if bounds is None else (bounds.first.contiguous(), bounds.last.contiguous())
    tail = queries if bounds is None or bounds.tail is None else _contiguous_in_dim(bounds.tail).view(torch.uint8)
    t = 0 if tail is queries else tail.shape[1]
    multiplier, cap = score_factors(scale, softcap)
    kernel, tensors, strides, kind = _coded(part) if part.is_coded else _dense(part)
    with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
        getattr(kernels, kernel)[tiles, chunks, key_heads](
            queries, *tensors, first, last, tail, outputs, lses,
            q, n, t, chunk, multiplier, cap, *queries.stride()[:2], tail.stride(0), *strides,
            K=key_heads, G=heads // key_heads, D=dim, BOUNDED=bounds is not None, TAILED=t > 0,
            CAPPED=softcap is not None, **kernels.dtypes(queries.dtype, coded), **kind, **own, **OPTIONS,
        )  # fmt: skip
        if chunks == 1:
            return outputs[0], lses[0]
        output, lse = torch.empty_like(outputs[0]), torch.empty_like(lses[0])
        kernels.joined[q * heads,](
            outputs, lses, output, lse, chunks, q * heads, D=dim, D_PADDED=own["D_PADDED"], **OPTIONS
        )
    return output, lse


def tile(rows: int, dim: int, dtype: torch.dtype, coded: bool) -> dict[str, int]:
    """Rows and columns of a tile: as many as the registers and shared memory of compute capability 8 hold.

    Chosen by the compiler's report: more rows spill registers, more columns or stages don't fit 99 KiB (8.6, 8.9).
    """
    padded = max(16, power_of_2(dim))
    key_bytes = padded * dtype.itemsize
    most = (64 if key_bytes < 512 else 32) // (2 if coded else 1)
    height = min(most, max(16, power_of_2(rows)))
    return {
        "M": height,
        "N": max(16, min(64, 16384 // key_bytes)),
        "D_PADDED": padded,
        "num_warps": 4 if height == 16 else 8,
        "num_stages": 3,
    }


def most_chunks(programs: int, device: torch.device) -> int:
    """The number of chunks of a long segment: two programs per processor, where `programs` of them load each column."""
    return _most_chunks(programs, _processors(device))


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """The kernels' arguments for scale and softcap: a multiplier of products, and the softcap in base 2."""
    return (scale * _LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2E)


def power_of_2(number: int) -> int:
    """The smallest power of two that isn't below the number."""
    return 1 << (number - 1).bit_length()


def kind_of(codec: Codec) -> dict[str, Any]:
    """The kernels' compile-time constants for a codec."""
    dual = isinstance(codec, DualCodec)
    return {"BITS": 4 if dual else codec.bits, "SYMMETRIC": codec.symmetric, "DUAL": dual}


def all_of(codes: Sequence[Tensor], codec: Codec) -> list[Tensor]:
    """A codec's eight tensors for the kernels; a missing one is replaced by another tensor that is never loaded."""
    dual, half = isinstance(codec, DualCodec), len(codes) // 2
    found = []
    for side in (codes[:half], codes[half:]):  # placeholders: the upper plane for the lower one, step for low
        found += [side[0], side[1 if dual else 0], side[2 if dual else 1], side[-1]]
    return found


def _chunk(n: int, programs: int, processors: int) -> int:
    """Columns of a chunk, a multiple of the block."""
    blocks = -(-n // BLOCK)
    return -(-blocks // min(_most_chunks(programs, processors), blocks)) * BLOCK


def _most_chunks(programs: int, processors: int) -> int:
    return min(max(1, 2 * processors // programs), MOST_CHUNKS)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _dense(part: Segment) -> _Arguments:
    keys, values = _contiguous_in_dim(part.keys), _contiguous_in_dim(part.values)
    return "dense", [keys, values], [*keys.stride()[:2], *values.stride()[:2]], {}


def _coded(part: Segment) -> _Arguments:
    assert isinstance(part.codec, Codec)
    tensors = all_of(part.tensors, part.codec)
    plane_blocks, scale_blocks = (tensors[i].stride(0) // tensors[i][0, 0].numel() for i in (0, 2))
    return "coded", tensors, [plane_blocks, scale_blocks], kind_of(part.codec)


def _contiguous_in_dim(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
