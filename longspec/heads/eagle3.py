"""EAGLE-3: a layer over features of three of the target's layers, fed with its own output (2503.01840).

    s = F [H_a; H_b; H_c],  x = [n(e); n'(s)],  y = n'(s) + attention(x),  y <- y + mlp(n"(y)),  next(y) = y

In the layout of `speculators` (`norm_before_residual`), so that what is trained here runs there. Different from the
paper: the output matrix is the target's, of its draft vocabulary. Training begins with a linear probe of the next
state: F has that of the features; that of the token the first query head of each group, which reads a row's own, as far
as the values have room. Features enter by powers of two that make their root mean square about 1, and which are taken
into F for drafting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspec.heads.fed import Fed
from longspec.heads.head import Batch, Fit, unit
from longspec.heads.layers import Layer, Norm
from longspec.model.config import Config

__all__ = ["Eagle3Head"]

OWN = 16.0
"""Score at first of a row's own token, where those of others are about 4: orthogonal products of inputs of a root mean
square of 1, whose length is that of a head.
"""


class Eagle3Layer(Layer):
    """With queries, keys and values of twice the width."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for name, heads in (("q_proj", config.heads), ("k_proj", config.key_heads), ("v_proj", config.key_heads)):
            self.self_attn[name] = nn.Linear(2 * config.width, heads * config.head_dim, bias=False)
        self.hidden_norm = Norm(config.width, config.eps)


class Eagle3Head(Fed):
    ONCE = ("fc",)
    scale: Tensor  # [reads], powers of two by which features are multiplied

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        self.register_buffer("scale", torch.ones(len(reads)))
        self.fc = nn.Linear(len(reads) * config.width, config.width, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = Norm(config.width, config.eps)

    @property
    def layer(self) -> Eagle3Layer:
        layer = self.layers[0]
        assert isinstance(layer, Eagle3Layer)
        return layer

    @classmethod
    def reads_of(cls, layers: int) -> tuple[int, ...]:
        """The second, the middle one and the third from the end, as the authors do."""
        return tuple(sorted({min(2, layers), max(1, layers // 2), max(1, layers - 3)}))

    @property
    def folded(self) -> Tensor:
        """[W, reads * W]: F for features as they are."""
        return self.fc.weight * self.scale.to(self.fc.weight.dtype).repeat_interleave(self.config.width)

    def enter(self, features: Tensor) -> Tensor:
        made: Tensor = self.fc(self._scaled(features))
        return made

    def _scaled(self, features: Tensor) -> Tensor:
        return features * self.scale.to(features.dtype).repeat_interleave(self.config.width)

    def inputs(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.layer.hidden_norm(states)
        return normed, torch.cat((self.layer.input_layernorm(tokens), normed), -1)

    def start(self, fit: Fit) -> None:
        width, sizes = self.config.width, list[Tensor]()

        def both(batch: Batch) -> Tensor:
            read = batch.read(self.reads)[:, :-1]
            by_layer = read.view(*read.shape[:-1], len(self.reads), width)
            sizes.append(by_layer.square().mean(-1).sqrt().flatten(0, 1))
            return torch.cat((read, unit(batch.embedded[:, 1:])), -1)

        found = fit(both, 1)
        self.scale.copy_(torch.exp2(-torch.cat(sizes).median(0).values.clamp_min(1e-9).log2().round()))
        states, token = found[:, :-width], found[:, -width:]
        self.fc.weight.copy_(states / self.scale.repeat_interleave(width))
        size = self.fc.weight.square().sum().div(width).sqrt()  # about that of the states, which the layer norms
        self._read_own(self.layer.self_attn, token / size)

    def _read_own(self, products: Any, token: Tensor) -> None:
        """Let the first query head of each group give about `token` [W, W] of a row's own token."""
        c = self.config
        left, sizes, right = torch.linalg.svd(token)
        rank, groups = min(c.width, c.key_heads * c.head_dim), c.heads // c.key_heads
        values, outs = products["v_proj"].weight, products["o_proj"].weight.view(c.width, c.key_heads, groups, -1)
        values.zero_()
        values[:rank, : c.width] = sizes[:rank, None].sqrt() * right[:rank]
        made = torch.zeros(c.width, c.key_heads * c.head_dim, device=token.device)
        made[:, :rank] = left[:, :rank] * sizes[:rank].sqrt()
        outs[:, :, 0].copy_(made.view(c.width, c.key_heads, -1))
        keys = products["k_proj"].weight
        drawn = torch.Generator(keys.device).manual_seed(0)  # the same ones in all workers, and when it goes on
        nn.init.orthogonal_(keys, OWN**0.5 * c.head_dim**-0.25, generator=drawn)
        queries = products["q_proj"].weight.view(c.key_heads, groups, c.head_dim, -1)
        queries[:, 0] = keys.view(c.key_heads, c.head_dim, -1)
