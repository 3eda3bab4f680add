"""Attention in torch operators: the reference, the CPU's portable backend, and the fallback on a GPU.

`read` is the definition, in plain operators; `read_flash` gives the same through torch's flash kernels, which also
return the log-sum-exp (difference to fp64 on the CPU: 5e-7 in fp32; no GPU has run this yet, its kernel's shapes are
tested on meta tensors). `whole` is for a single segment, where no log-sum-exp is needed.

The query heads of a group are stacked as rows, so that a key head is loaded once for its group: with 8 positions and
7,000 bf16 columns of the default model 0.5 ms a layer on two cores with AMX, against 1.0 ms through `enable_gqa`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.cache.choice import Chosen
from longspec.cache.stage import Segment

__all__ = ["USE", "decoded", "has_flash", "no_gpu", "read", "read_flash", "sunk", "whole"]

USE = "torch's own operators, for the CPU and for what others leave on a GPU"


def decoded(parts: Iterable[Segment]) -> Iterator[Segment]:
    """The segments as dense ones: quantized segments are dequantized piece by piece."""
    for part in parts:
        yield from part.pieces()


def whole(queries: Tensor, part: Segment, scale: float) -> Tensor:
    """Attention of queries [q, H, D] over one segment; [q, H, D]."""
    rows, groups = _grouped(queries, part)
    output = F.scaled_dot_product_attention(
        rows,
        part.keys[None],
        part.values[None],
        attn_mask=_bias(part, rows, groups),
        is_causal=_is_causal(part, groups),
        scale=scale,
    )
    return _ungrouped(output[0], queries)


def has_flash(queries: Tensor, part: Segment, softcap: float | None) -> bool:
    """Whether `read_flash` can take it: on the CPU any segment, on a GPU unbounded ones in half precision."""
    if softcap is not None or part.chosen is not None:
        return False
    if queries.device.type == "cpu":
        return True
    half = queries.dtype in (torch.bfloat16, torch.float16)
    fits = queries.shape[-1] <= 256 and queries.shape[-1] % 8 == 0
    return queries.device.type == "cuda" and part.bounds is None and half and fits and no_gpu() is None


def read_flash(queries: Tensor, part: Segment, scale: float) -> tuple[Tensor, Tensor]:
    """As `read`, by torch's flash kernels where `has_flash`; the output is in the queries' dtype."""
    rows, groups = _grouped(queries, part)
    keys, values = part.keys.unsqueeze(0), part.values.unsqueeze(0)
    if queries.device.type == "cuda":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(rows, keys, values, scale=scale)[:2]
    else:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, values, 0.0, _is_causal(part, groups), attn_mask=_bias(part, rows, groups), scale=scale
        )
    lse = lse.reshape(rows.shape[1], groups, -1).permute(2, 0, 1).reshape(queries.shape[:2])
    if part.bounds is not None:  # the kernel returns 0, not -inf, for a query without allowed columns
        lse = lse.masked_fill((part.bounds.first >= part.bounds.last)[:, None], float("-inf"))
    return _ungrouped(output.squeeze(0), queries), lse


def read(queries: Tensor, part: Segment, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of queries [q, H, D] over one segment: output [q, H, D] and log-sum-exp [q, H], both fp32.

    With a softcap c the scores are c * tanh(score / c) (Gemma 2). A query without allowed columns gives zeros and
    -inf.
    """
    if part.chosen is not None:
        return _read_chosen(queries, part, part.chosen, scale, softcap)
    rows, groups = _grouped(queries, part)
    scores = _capped(torch.matmul(rows[0].float(), part.keys.float().transpose(1, 2)) * scale, softcap)  # [K, G * q, n]
    if part.bounds is not None:
        scores = scores + part.bounds.bias(part.keys.shape[1], scores.dtype, groups)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    output = _ungrouped(torch.matmul(weights, part.values.float()), queries)
    return output, lse.reshape(len(part.keys), groups, -1).permute(2, 0, 1).reshape(queries.shape[:2])


def _read_chosen(
    queries: Tensor, part: Segment, chosen: Chosen, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`read` where each row reads some columns as exact rows: their scores and values take the place of the codes'."""
    (rows, groups), (key_heads, n, dim), q = _grouped(queries, part), part.keys.shape, len(queries)
    is_none = (chosen.columns < 0).permute(1, 0, 2)[:, None]  # [K, 1, q, c]
    place = chosen.columns.long().permute(1, 0, 2)[:, None].masked_fill(is_none, n)  # n: a column that nobody reads
    place = place.expand(-1, groups, -1, -1)
    keys, values = chosen.rows[chosen.slots.long().clamp(min=0)].float().unbind(3)  # [q, K, c, D]
    grouped = rows[0].float().view(key_heads, groups, q, dim)
    own = _capped(torch.einsum("kgqd,qkcd->kgqc", grouped, keys) * scale, softcap)
    scores = _capped(torch.matmul(rows[0].float(), part.keys.float().transpose(1, 2)) * scale, softcap)
    if part.bounds is not None:
        scores = scores + part.bounds.bias(n, scores.dtype, groups)
    scores = F.pad(scores.view(key_heads, groups, q, n), (0, 1), value=float("-inf"))
    scores = scores.scatter(-1, place, own.masked_fill(is_none, float("-inf")))
    lse = torch.logsumexp(scores, -1)  # [K, G, q]
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    exact = torch.einsum("kgqc,qkcd->kgqd", weights.gather(-1, place), values)
    coded = torch.matmul(weights.scatter(-1, place, 0.0)[..., :n].flatten(1, 2), part.values.float())
    output = (coded.view(key_heads, groups, q, dim) + exact).permute(2, 0, 1, 3).reshape(queries.shape)
    return output, lse.permute(2, 0, 1).reshape(queries.shape[:2])


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def sunk(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Output [q, H, D] with log-sum-exp [q, H], after each head's sink [H] took its share; fp32."""
    return output.float() * torch.sigmoid(lse - sinks)[..., None]


@cache
def no_gpu() -> str | None:
    """The reason why this machine has no GPU for flash kernels; None where it has one."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    return f"the GPU's compute capability is {major}.{minor}, below 8.0" if major < 8 else None


def _grouped(queries: Tensor, part: Segment) -> tuple[Tensor, int]:
    """Queries [q, H, D] as [1, K, G * q, D], and G: the G query heads that share a key head are stacked."""
    q, heads, dim = queries.shape
    key_heads = part.keys.shape[0]
    groups = heads // key_heads
    if q == 1:
        return queries.reshape(1, key_heads, groups, dim), groups
    return queries.reshape(q, key_heads, groups, dim).permute(1, 2, 0, 3).reshape(1, key_heads, groups * q, dim), groups


def _ungrouped(output: Tensor, queries: Tensor) -> Tensor:
    """Output [K, G * q, D] as [q, H, D]."""
    q, heads, dim = queries.shape
    if q == 1:
        return output.reshape(1, heads, dim)
    return output.reshape(heads, q, dim).transpose(0, 1)


def _is_causal(part: Segment, groups: int) -> bool:
    return groups == 1 and part.bounds is not None and part.bounds.causal


def _bias(part: Segment, rows: Tensor, groups: int) -> Tensor | None:
    if part.bounds is None or _is_causal(part, groups):
        return None
    return part.bounds.bias(part.keys.shape[1], rows.dtype, groups)
