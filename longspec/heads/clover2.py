"""Clover-2: two augmenting layers over the text, and an output cell that takes drafted tokens (2408.00264).

    g_t = n(H_t) + attend(n(H_t), e(x_t+1))       the token behind a row, before the layers
    h   = norm(layers(g))                         two layers, once per step, with keys and values of their own
    y_0 = W_1 h                                   what is behind x_t+1
    h  <- h + attend'(h, e(x)),  y_i = W_2 [h; e(x)]   once per depth

Different from the paper's code: H is normed on its way in, so that nothing depends on the scale of a target's hidden
states; embeddings are the target's own, normed; the layers begin as the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longspec.heads.layers import Head, Layer, Norm, TokenAttention, heads_of, near_identity
from longspec.model.config import Config

__all__ = ["Clover2"]


class Clover2(Head):
    LAYERS = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, eps = config.width, config.eps
        self.feature_norm, self.token_norm = Norm(width, eps), Norm(width, eps)
        self.entry = TokenAttention(width, heads_of(config))
        self.layers = nn.ModuleList(Layer(config) for _ in range(self.LAYERS))
        self.between = Norm(width, eps)
        self.first = nn.Linear(width, width, bias=False)
        self.cell = TokenAttention(width, heads_of(config))
        self.join = nn.Linear(2 * width, width, bias=False)
        self.norm = Norm(width, eps)
        near_identity(self.first)
        near_identity(self.join)

    def enter(self, features: Tensor, tokens: Tensor) -> Tensor:
        features = self.feature_norm(features)
        entered: Tensor = features + self.entry(features, tokens)
        return entered

    def begin(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, self.first(hidden)

    def step(self, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        state = state + self.cell(state, tokens)
        return state, self.join(torch.cat((state, tokens), -1))
