"""Cerberus heads (2410.13344): one a depth, all at once, and each takes what the head before it has made so far.

    h_i <- h_i + silu(W_i [h_i; h_i-1])    in every block, all heads i side by side; h_0 is the target's last state

A head reads its neighbour as the block before left it, so that none waits for another: one product a block. What a
depth makes of the state reaches those behind it, which Medusa's heads lack, without a step for each.
Different from the paper: h_i begins as a linear probe of its depth rather than as the state itself, since that is what
least squares finds; states are of a root mean square of 1; the LM head is the target's own. The paper's gate is
`--control entropy`, of any drafter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspec.heads.all_depths import AllDepths
from longspec.heads.head import Fit, unit
from longspec.heads.layers import Norm
from longspec.model.config import Config

__all__ = ["Cerberus"]

BLOCKS = 2
"""As far as a depth's news travels: with 2, head i has heard of heads i - 1 and i - 2."""


class Cerberus(AllDepths):
    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        width = config.width
        self.probes = nn.Linear(width, depth * width, bias=False)  # the rows of one depth behind those of another
        self.blocks = nn.ModuleList(nn.Linear(2 * width, depth * width, bias=False) for _ in range(BLOCKS))
        self.norm = Norm(width, config.eps)
        for block in self.blocks:
            nn.init.zeros_(block.weight)  # type: ignore[arg-type]

    def all_depths(self, features: Tensor, tokens: Tensor) -> Tensor:
        last = unit(features)
        heads: Tensor = self.probes(last).unflatten(-1, (self.depth, -1))
        for block in self.blocks:
            before = torch.cat((last[..., None, :], heads[..., :-1, :]), -2)
            weights = block.weight.unflatten(0, (self.depth, -1))  # type: ignore[operator]
            heads = heads + F.silu(torch.einsum("...ki,koi->...ko", torch.cat((heads, before), -1), weights))
        return heads

    def start(self, fit: Fit) -> None:
        last = self.reads[-1]
        probes = [fit(lambda batch: unit(batch.states[last]), i + 1) for i in range(self.depth)]
        self.probes.weight.copy_(torch.cat(probes))
