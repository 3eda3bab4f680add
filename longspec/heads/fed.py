"""Heads of one layer over the text that is fed with its own output for each drafted token, and FastMTP, the plainest.

    s = enter(H_t);  y_1 = layer(s, e(x_t+1));  y_2 = layer(next(y_1), e(x_t+2));  ...   a chain behind each position t

All rows of a chain read the text up to t, and the chain before them. Training unrolls all chains at once, with the true
tokens (EAGLE-3's training-time test): depth by depth, so that a row of depth i adds i scores to those of the text's
rows. Drafting is that of published heads (`longspec.drafters.heads.fed`); tests hold that both agree.

FastMTP (2509.18362) is DeepSeek's head of multi-token prediction with one block for all depths:

    s = n(H),  x = F [n'(e); n"(s)],  y = block(x),  next(y) = norm(y)      n: the target's final norm, which is kept

Different from the paper: F begins as a linear probe, and the block as the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspec.heads.head import Batch, Fit, Head, Out
from longspec.heads.layers import Layer, Norm, turn_of
from longspec.model.config import Config
from longspec.model.rope import rotate

__all__ = ["FastMtp", "Fed"]

_Rows = tuple[Tensor, Tensor]  # keys and values [B, heads, n, D]


class Fed(Head):
    LAYERS = 1
    ONCE: ClassVar[tuple[str, ...]] = ()
    """Names of the modules that run once a draft; the others run for each drafted token."""

    layers: nn.ModuleList

    @property
    def layer(self) -> Layer:
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        return layer

    def enter(self, features: Tensor) -> Tensor:
        """The first states [..., W] of chains, from the states [..., reads * W] of their positions."""
        raise NotImplementedError

    def inputs(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What attention is added to [..., W], and what it reads; from states and the embeddings of the next tokens."""
        raise NotImplementedError

    def following(self, outputs: Tensor) -> Tensor:
        """The next states of the chains, from the layer's outputs."""
        return outputs

    def outputs(self, batch: Batch) -> Iterator[Out]:
        states, tokens = self.enter(batch.read(self.reads)[:, :-1]), batch.embedded[:, 1:]
        length, chain = tokens.shape[1], list[_Rows]()
        residual, normed = self.inputs(states, tokens)
        queries, text = self._heads(normed, torch.arange(length, device=tokens.device))
        places, weight = batch.chains(0, length)
        made = self.layer.fed(residual[:, places] + self._attended(queries[:, :, places], text, chain, places))
        yield Out(made, 1, weight, places)
        for i in range(1, min(self.depth, length)):
            before, (places, weight) = places, batch.chains(i, length)
            stay = torch.searchsorted(before, places)
            residual, normed = self.inputs(self.following(made[:, stay]), tokens[:, places + i])
            queries, own = self._heads(normed, places + i)
            chain = [*((keys[:, :, stay], values[:, :, stay]) for keys, values in chain), own]
            made = self.layer.fed(residual + self._attended(queries, text, chain, places))
            yield Out(made, i + 1, weight, places)

    def cost(self) -> tuple[int, int]:
        whole, _ = super().cost()
        once = sum(value.numel() for name in self.ONCE for value in self.get_submodule(name).parameters())
        return whole + (self.depth - 1) * (whole - once), self.depth

    def _heads(self, normed: Tensor, positions: Tensor) -> tuple[Tensor, _Rows]:
        """Queries [B, heads, n, D] of rows normed [B, n, ...], and their keys and values, repeated for all heads."""
        products, c = self.layer.self_attn, self.config
        queries, keys, values = (
            products[name](normed).unflatten(-1, (-1, c.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
        )
        if c.query_norm == "head":
            queries, keys = products["q_norm"](queries), products["k_norm"](keys)
        turn = turn_of(c, positions, normed.dtype)
        queries, keys = rotate(queries, *turn).transpose(1, 2), rotate(keys, *turn).transpose(1, 2)
        keys, values = (x.repeat_interleave(c.heads // c.key_heads, 1) for x in (keys, values.transpose(1, 2)))
        return queries, (keys.to(queries.dtype), values)

    def _attended(self, queries: Tensor, text: _Rows, chain: Sequence[_Rows], places: Tensor) -> Tensor:
        """Attention [B, n, W] of the chains' rows of one depth, whose own keys and values are the chain's last ones."""
        scale = self.config.scale
        scores = [queries @ text[0].transpose(-1, -2) * scale + self._unread(places, text[0].shape[2], len(chain))]
        scores += [(queries * keys).sum(-1, keepdim=True) * scale for keys, _ in chain]
        weights = torch.softmax(torch.cat(scores, -1).float(), -1).to(queries.dtype)
        read = weights[..., : text[1].shape[2]] @ text[1]
        for i, (_, values) in enumerate(chain):
            read = read + weights[..., text[1].shape[2] + i, None] * values
        made: Tensor = self.layer.self_attn["o_proj"](read.transpose(1, 2).flatten(2))
        return made

    def _unread(self, places: Tensor, length: int, depth: int) -> Tensor:
        """[n, length]: -inf where the chain of a row may not read a row of the text, 0 elsewhere."""
        at, rows = places[:, None], torch.arange(length, device=places.device)
        unread = (rows > at) | (at + depth - rows >= (self.config.windows[0] or 1 << 40))
        return torch.zeros(len(places), length, device=places.device).masked_fill(unread, -torch.inf)


class FastMtp(Fed):
    final: Tensor  # [W], weights of the target's final norm

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        width, eps = config.width, config.eps
        self.register_buffer("final", torch.ones(width))
        self.token_norm, self.state_norm = Norm(width, eps), Norm(width, eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([Layer(config)])
        products = self.layer.self_attn
        products["q_norm"], products["k_norm"] = Norm(config.head_dim, eps), Norm(config.head_dim, eps)
        self.norm = Norm(width, eps)

    @classmethod
    def block(cls, config: Config) -> Config:
        """Queries and keys are normed by head, as in the models for which such heads are published."""
        return replace(config, query_norm="head")

    def take(self, final: Tensor) -> None:
        super().take(final)
        self.final.copy_(final)

    def enter(self, features: Tensor) -> Tensor:
        return F.rms_norm(features, self.final.shape, self.final.to(features.dtype), self.config.eps)

    def inputs(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(self._both(states, tokens))
        return x, self.layer.input_layernorm(x)

    def following(self, outputs: Tensor) -> Tensor:
        made: Tensor = self.norm(outputs)
        return made

    def _both(self, states: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat((self.token_norm(tokens), self.state_norm(states)), -1)

    def start(self, fit: Fit) -> None:
        """The first token's probe; the norms of what enters it are those that make a root mean square of 1."""
        self.fc.weight.copy_(fit(lambda b: self._both(self.enter(b.read(self.reads)[:, :-1]), b.embedded[:, 1:]), 1))
