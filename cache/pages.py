"""Query-aware selection of blocks, by an upper bound on the attention score of each block's keys (Quest, 2406.10774).

max over positions j of q . k_j  <=  sum over channels d of max(q_d * least_d, q_d * greatest_d)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_scores"]


def block_scores(queries: Tensor, least: Tensor, greatest: Tensor, readable: Tensor) -> Tensor:
    """[q, b]: score of each block for each query [q, H, D], summed over heads; -1 for blocks that it may not read.

    least, greatest: [K, b, D], per channel of a block's keys. readable: [q, b] bool. A head's bounds go through a
    softmax over the blocks before the sum, since heads have no common scale.
    """
    q, heads, dim = queries.shape
    grouped = queries.float().reshape(q, len(least), heads // len(least), dim).permute(1, 2, 0, 3)  # [K, G, q, D]
    high, low = greatest.transpose(1, 2)[:, None], least.transpose(1, 2)[:, None]  # [K, 1, D, b]
    bounds = (grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low) * dim**-0.5
    falling = torch.softmax(bounds.masked_fill(~readable, float("-inf")), -1).nan_to_num(0.0)
    return falling.sum((0, 1)).masked_fill(~readable, -1.0)
