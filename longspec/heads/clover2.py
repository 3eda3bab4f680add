"""Clover-2: two augmenting layers over the sequence, and an output cell that takes draft tokens (2408.00264).

    g_t = n(H_t) + attend(n(H_t), e(x_t+1))       the next token enters before the layers
    h   = norm(layers(g))                         two layers, once per step, with a KV cache of their own
    y_0 = W_1 h                                   predicts the token after x_t+1
    h  <- h + attend'(h, e(x)),  y_i = W_2 [h; e(x)]   once per depth

H: the target's hidden states; e(x): the embedding of token x; y: hidden states for the target's LM head.
Different from the paper's code: H is normed first, so that nothing depends on the scale of a target's hidden states;
embeddings are the target's own, normed; the layers are initialised as the identity.
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
