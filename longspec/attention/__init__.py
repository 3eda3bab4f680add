"""Parts in, output out.

Each part of a cache is read on its own, and the results are joined by their log-sum-exp, so that a cache needs
a reader for its own blocks only and a tree's mask never meets a quantized kernel (LongSpec's hybrid tree attention,
arXiv 2502.17421, without its restriction to two parts). A single part needs no log-sum-exp and takes the short way.

    softmax over A and B together  =  w * softmax over A + (1 - w) * softmax over B,   w = sigmoid(lse_A - lse_B)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from longspec.attention import reference
from longspec.attention.strict import attend_strictly
from longspec.cache.stage import CodedPart, Part

__all__ = ["attend", "attend_strictly", "merge"]


def attend(queries: Tensor, parts: Iterable[Part | CodedPart], scale: float, softcap: float | None = None) -> Tensor:
    """Attention of queries [q, H, D] over all parts; [q, H, D] in the queries' dtype.

    Every row must be allowed at least one column of at least one part (its own staged row always is).
    """
    pieces = reference.decoded(parts)
    part = next(pieces)
    following = next(pieces, None)
    if following is None and softcap is None:
        return reference.whole(queries, part, scale)
    total = _read(queries, part, scale, softcap)
    while following is not None:
        total = merge(total, _read(queries, following, scale, softcap))
        following = next(pieces, None)
    return total[0].to(queries.dtype)


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two partial results over disjoint columns as one: outputs [q, H, D] and log-sum-exps [q, H], in fp32.

    A side in which a row reads nothing has -inf there and doesn't count, whatever its output holds.
    """
    (output_a, lse_a), (output_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - base)[..., None], torch.exp(lse_b - base)[..., None]
    output = torch.where(weight_a > 0, output_a.float() * weight_a, 0.0)
    return output + torch.where(weight_b > 0, output_b.float() * weight_b, 0.0), lse


def _read(queries: Tensor, part: Part, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    if softcap is None and queries.device.type == "cpu":
        return reference.read_flash(queries, part, scale)
    return reference.read(queries, part, scale, softcap)
