"""Clover: one augmenting block over the sequence, and an attention decoder that takes each draft token (2405.00263).

    h   = norm(block(n(H) + F [u(H'); ...]))   once per step, with a KV cache of its own
    h  <- h + attend(n'(h), e(x)),  y = h + silu(W h)    the regressive connection: after x_t+1, then once per depth

H: the target's last hidden states; F: a matrix over the states that it reads, each of a root mean square of 1 (the
paper's enters H alone); e(x): the embedding of token x. One cell serves all depths, where the paper has a head
for each: a draft may then have any depth, and the cell's weights stay in the CPU's cache. Its attention is Clover-2's
(cosines), since a softmax over one key is constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspec.heads.head import Fit
from longspec.heads.layers import Layer, Norm, TokenAttention, heads_of
from longspec.heads.recurrent import Recurrent
from longspec.model.config import Config

__all__ = ["Clover"]


class Clover(Recurrent):
    LAYERS = 1
    EACH = ("query_norm", "cell", "out", "norm")

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        width, eps = config.width, config.eps
        self.feature_norm, self.token_norm = Norm(width, eps), Norm(width, eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(self.LAYERS))
        self.between, self.query_norm = Norm(width, eps), Norm(width, eps)
        self.cell = TokenAttention(width, heads_of(config))
        self.out = nn.Linear(width, width)
        self.norm = Norm(width, eps)
        if reads:
            self.fuse = nn.Linear(len(reads) * width, width, bias=False)
        with torch.no_grad():
            self.out.weight.mul_(0.1)
            if self.fuse is not None:
                self.fuse.weight.zero_()

    def enter(self, features: Tensor, tokens: Tensor) -> Tensor:
        entered: Tensor = self.feature_norm(features[..., -self.config.width :])
        return entered if self.fuse is None else entered + self.fuse(self.units(features))

    def begin(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(hidden, tokens)

    def step(self, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        state = state + self.cell(self.query_norm(state), tokens)
        return state, state + F.silu(self.out(state))

    def start(self, fit: Fit) -> None:
        """The first token's probe, its states before the layer and its token in the cell. The state of the cell begins
        with a root mean square of 1, and so the token's part is divided by that of the states'.
        """
        if self.fuse is None:
            return
        width = self.config.width
        both = fit(self.probe, 1)
        states, token = both[:, :-width], both[:, -width:]
        size = states.square().sum().div(width).sqrt()  # about what it makes of unit states
        with torch.no_grad():
            self.fuse.weight.copy_(states)
            self.fuse.weight[:, -width:] -= torch.eye(width, device=states.device)
            self.between.weight.fill_(1.0)
            self.cell.start(token / size)
            self.out.weight.zero_()
            self.out.bias.zero_()
