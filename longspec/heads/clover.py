"""Clover: one augmenting block over the sequence, and an attention decoder that takes each draft token (2405.00263).

    h   = norm(block(n(H)))                    once per step, with a KV cache of its own
    h  <- h + attend(n'(h), e(x)),  y = h + silu(W h)    the regressive connection: after x_t+1, then once per depth

H: the target's hidden states; e(x): the embedding of token x. One cell serves all depths, where the paper has a head
for each: a draft may then have any depth, and the cell's weights stay in the CPU's cache. Its attention is Clover-2's
(cosines), since a softmax over one key is constant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspec.heads.layers import Head, Layer, Norm, TokenAttention, heads_of
from longspec.model.config import Config

__all__ = ["Clover"]


class Clover(Head):
    LAYERS = 1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, eps = config.width, config.eps
        self.feature_norm, self.token_norm = Norm(width, eps), Norm(width, eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(self.LAYERS))
        self.between, self.query_norm = Norm(width, eps), Norm(width, eps)
        self.cell = TokenAttention(width, heads_of(config))
        self.out = nn.Linear(width, width)
        self.norm = Norm(width, eps)
        with torch.no_grad():
            self.out.weight.mul_(0.1)

    def enter(self, features: Tensor, tokens: Tensor) -> Tensor:
        entered: Tensor = self.feature_norm(features)
        return entered

    def begin(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(hidden, tokens)

    def step(self, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        state = state + self.cell(self.query_norm(state), tokens)
        return state, state + F.silu(self.out(state))
