"""Clover-2: two augmenting layers over the sequence, and an output cell that takes draft tokens (2408.00264).

    g_t = n(H_t) + attend(n(H_t), e(x_t+1)) + F [u(H'_t); ...; e(x_t+1)]    the next token enters before the layers
    h   = norm(layers(g))                         two layers, once per step, with a KV cache of their own
    y_0 = W_1 h                                   predicts the token after x_t+1
    h  <- h + attend'(h, e(x)),  y_i = W_2 [h; e(x)]   once per depth

H: the target's last hidden states, H' those of all layers that it reads, u(H') of a root mean square of 1; e(x): the
embedding of token x; y: hidden states for the target's LM head.
Different from the paper's code: H is normed first, so that nothing depends on the scale of a target's hidden states;
embeddings are the target's own, normed; several layers are read, by a matrix F that begins as a linear probe of the
next state; the layers are initialised as the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longspec.heads.head import Batch, Fit, unit
from longspec.heads.layers import Layer, Norm, TokenAttention, heads_of, near_identity
from longspec.heads.recurrent import Recurrent
from longspec.model.config import Config

__all__ = ["Clover2"]


class Clover2(Recurrent):
    LAYERS = 2
    EACH = ("cell", "join", "norm")

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
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
        if reads:
            self.fuse = nn.Linear((len(reads) + 1) * width, width, bias=False)
            nn.init.zeros_(self.fuse.weight)

    def enter(self, features: Tensor, tokens: Tensor) -> Tensor:
        last = self.feature_norm(features[..., -self.config.width :])
        return self.fused(last + self.entry(last, tokens), features, tokens)

    def fused(self, entered: Tensor, features: Tensor, tokens: Tensor) -> Tensor:
        """`entered`, the input of the layers as the paper has it, and what `fuse` adds."""
        return entered if self.fuse is None else entered + self.fuse(torch.cat((self.units(features), tokens), -1))

    def begin(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, self.first(hidden)

    def step(self, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        state = state + self.cell(state, tokens)
        return state, self.join(torch.cat((state, tokens), -1))

    def start(self, fit: Fit) -> None:
        """Before the layers a probe of the next state, which `first` passes on; then one of the state behind it, of
        that guess and the token in between.
        """
        if self.fuse is None:
            return
        eye = torch.eye(self.config.width, device=self.fuse.weight.device)
        probe = fit(self.probe, 1)

        def second(batch: Batch) -> Tensor:
            guess = unit(self.probe(batch) @ probe.T)[:, :-1]
            return torch.cat((guess, self.token_norm(batch.embedded[:, 2:])), -1)

        with torch.no_grad():
            width = self.config.width
            self.fuse.weight.copy_(probe)
            self.fuse.weight[:, -2 * width : -width] -= eye  # the last state is there already
            self.entry.start(torch.zeros_like(eye))
            self.cell.start(torch.zeros_like(eye))
            self.first.weight.copy_(eye)
            self.join.weight.copy_(fit(second, 2))
