"""SpecFormer: attention over the text, then attention across a block of all depths at once (2511.20340).

    x_t = P [u(H_t)]                    the target's states of four layers, the embedding among them
    h_t = x_t + attend(n(x_t))          causal, over the text: one cached row for each position
    b_i = (E u(h_t) + c)_i              a vector for each depth i
    b  <- b + attend'(n'(b))            of a block, in both directions, with rotary places
    b  <- b + mlp(n''(b))               the first layer's MLP, which isn't run over the text

H_t: hidden states; u(H) of a root mean square of 1; the tokens' logits are the target's LM head of a copy of its final
norm. It is made for batches: one pass drafts for all texts, a chain each, and no token that is drafted is run again.
Different from the paper: the loss of every head here, whose later depths weigh less; P begins as a linear probe of the
next state and E as those of the depths, the attentions and the MLP as nothing. The authors' code builds the block's
attention causal, against its paper; this is the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from longspec.heads.head import Batch, Fit, Out, unit
from longspec.heads.layers import Layer, Norm, attended, projections, turn_of
from longspec.heads.one_pass import OnePass
from longspec.model.config import Config

__all__ = ["SpecFormer"]


class SpecFormer(OnePass):
    TREE, SECONDS = False, 0
    ATTENTION_ONLY = True

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        width = config.width
        self.fuse = nn.Linear(len(reads) * width, width, bias=False)
        self.layers = nn.ModuleList([Layer(config)])
        self.spread = nn.Linear(width, depth * width)
        self.block_norm = Norm(width, config.eps)
        self.block_attn = projections(config)
        self.norm = Norm(width, config.eps)

    @classmethod
    def reads_of(cls, layers: int) -> tuple[int, ...]:
        return tuple(sorted({0, max(1, layers // 2), max(1, layers - 1), layers}))

    def enter(self, features: Tensor, tokens: Tensor) -> Tensor:
        entered: Tensor = self.fuse(self.units(features))
        return entered

    def drafted(self, hidden: Tensor) -> Tensor:
        block = self.spread(unit(hidden)).unflatten(-1, (self.depth, -1))
        turn = turn_of(self.config, torch.arange(self.depth, device=block.device), block.dtype)
        block = block + attended(self.block_attn, self.block_norm(block), self.config, turn, is_causal=False)
        return cast(Layer, self.layers[0]).fed(block)

    def outputs(self, batch: Batch) -> Iterator[Out]:
        x = self.enter(batch.read(self.reads)[:, :-1], batch.embedded[:, 1:])
        texts, length = x.shape[:2]
        turn = turn_of(self.config, torch.arange(length, device=x.device), x.dtype)
        hidden = cast(Layer, self.layers[0]).mixed(x, turn)
        first, _ = batch.chains(0, length)
        made = self.drafted(hidden[:, first].flatten(0, 1)).view(texts, len(first), self.depth, -1)
        for i in range(min(self.depth, length)):
            places, weight = batch.chains(i, length)
            yield Out(made[:, torch.searchsorted(first, places), i], i + 1, weight, places)

    def start(self, fit: Fit) -> None:
        self.fuse.weight.copy_(fit(lambda batch: self.units(batch.read(self.reads)), 1))

        def entered(batch: Batch) -> Tensor:
            return unit(self.enter(batch.read(self.reads), batch.embedded))

        self.spread.weight.copy_(torch.cat([fit(entered, i + 1) for i in range(self.depth)]))
        nn.init.zeros_(self.spread.bias)
