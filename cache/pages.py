"""Which old blocks a query asks for, by bounds on the keys of each (Quest, 2406.10774).

max over rows j of q . k_j  <=  sum over channels of max(q_d * least_d, q_d * greatest_d)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_scores"]


def block_scores(queries: Tensor, least: Tensor, greatest: Tensor, readable: Tensor) -> Tensor:
    """[q, b]: how much of the attention of each row [q, H, D] may fall on each block; -1 where it may not read it.

    least, greatest: [K, b, D], of a block's keys per channel. readable: [q, b] bool. Heads are summed after a softmax
    over the blocks, since their scores have no common scale.
    """
    q, heads, dim = queries.shape
    grouped = queries.float().reshape(q, len(least), heads // len(least), dim).permute(1, 2, 0, 3)  # [K, G, q, D]
    high, low = greatest.transpose(1, 2)[:, None], least.transpose(1, 2)[:, None]  # [K, 1, D, b]
    bounds = (grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low) * dim**-0.5
    falling = torch.softmax(bounds.masked_fill(~readable, float("-inf")), -1).nan_to_num(0.0)
    return falling.sum((0, 1)).masked_fill(~readable, -1.0)
