"""Backend on the flash-attn package (2.6 or newer), where it is installed: dense segments in half precision.

Its split-KV kernel returns the log-sum-exp, by which `longspec.attention.merge` adds tree positions and quantized
segments that other backends compute. It takes segments that all queries attend to in full, and the causal square of a
prefill chunk; a segment in which all queries have the same range comes without bounds, since caches slice it.

No hardware has run this yet: `tests/attention/test_flash.py` calls it with a stand-in of the same signature, and
`tests/gpu` waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from longspec.attention.reference import no_gpu
from longspec.cache.stage import Segment

__all__ = ["USE", "missing", "read", "refuses"]

USE = "dense prefixes on the GPU"


@cache
def missing() -> str | None:
    """The reason why this machine can't run it; None where it can."""
    if find_spec("flash_attn") is None:
        return "the package flash-attn isn't installed"
    if (why := no_gpu()) is not None:
        return why
    try:
        takes = signature(_kernel()).parameters
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        return f"the package flash-attn is installed, but can't be loaded: {error}"
    if not {"softcap", "return_softmax_lse"} <= set(takes):
        return "the package flash-attn is older than 2.6"
    return None


def refuses(queries: Tensor, part: Segment, softcap: float | None) -> str | None:
    """The reason why it can't attend from these queries to this segment; None where it can."""
    if queries.device.type != "cuda":
        return "the pass is not on a CUDA GPU"
    if (why := missing()) is not None:
        return why
    if part.is_coded:
        return "it reads dense rows only"
    if queries.dtype not in (torch.bfloat16, torch.float16):
        return f"it reads bf16 and fp16, not {queries.dtype}"
    if queries.shape[-1] > 256 or queries.shape[-1] % 8:
        return f"it reads heads of 8 to 256 channels in steps of 8, not {queries.shape[-1]}"
    if part.bounds is not None and not part.bounds.causal:
        return "each row reads columns of its own"
    return None


def read(queries: Tensor, part: Segment, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of queries [q, H, D] over one segment: output [q, H, D] in their dtype, log-sum-exp [q, H] in fp32."""
    assert not part.is_coded
    output, lse = _kernel()(
        queries[None],
        part.keys.transpose(0, 1)[None],  # [1, n, K, D]
        part.values.transpose(0, 1)[None],
        softmax_scale=scale,
        causal=part.bounds is not None,
        softcap=softcap or 0.0,
        return_softmax_lse=True,
    )
    return output[0], lse[0].T


@cache
def _kernel() -> Callable[..., Any]:
    function: Callable[..., Any] = import_module("flash_attn").flash_attn_with_kvcache
    return function
