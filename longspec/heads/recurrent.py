"""Heads that draft token by token: layers over the text, then a cell that takes one draft token after the other.

A subclass says what enters the layers, the first state and a step; training unrolls these over the depths, and
`longspec.drafters.heads.clover` runs them, the layers through a `Decoder`. Tests hold that both agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from longspec.heads.head import Batch, Head, Out, unit
from longspec.heads.layers import Norm, turn_of
from longspec.model.config import Config

__all__ = ["Recurrent"]


class Recurrent(Head):
    """Hidden states and embeddings have any leading dimensions; `tokens` are normed embeddings."""

    EACH: ClassVar[tuple[str, ...]]
    """Names of the modules that run for each drafted token; the others once a draft."""

    layers: nn.ModuleList
    token_norm: Norm  # of embeddings
    between: Norm  # after the layers
    fuse: nn.Linear | None
    """[W, inputs]: what is added to the last state before the layers, of unit states and perhaps the token behind
    them. Without `reads` (files from before there were any) the last state enters alone.
    """

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        self.fuse = None

    @classmethod
    def reads_of(cls, layers: int) -> tuple[int, ...]:
        """The middle one, the third from the end and the last."""
        return tuple(sorted({max(1, layers // 2), max(1, layers - 3), layers}))

    def enter(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Input of the layers [..., W], from each position's states [..., reads * W] and the token after it."""
        raise NotImplementedError

    def begin(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """State and output after the last committed token. hidden: the layers' output for the position before it."""
        raise NotImplementedError

    def step(self, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Next state and output, after one more draft token."""
        raise NotImplementedError

    def units(self, features: Tensor) -> Tensor:
        """Each layer's states of a root mean square of 1: [..., reads * W]."""
        return unit(features.view(*features.shape[:-1], -1, self.config.width)).flatten(-2)

    def run(self, features: Tensor, tokens: Tensor) -> Tensor:
        """The layers' output [B, T, W], normed: the hidden states that the cell begins with."""
        hidden = self.enter(features, tokens)
        turn = turn_of(self.config, torch.arange(features.shape[1], device=features.device), features.dtype)
        for layer in self.layers:
            hidden = layer(hidden, turn)
        return cast(Tensor, self.between(hidden))

    def outputs(self, batch: Batch) -> Iterator[Out]:
        features = batch.read(self.reads or (max(batch.states),))[:, :-1]
        tokens, length = self.token_norm(batch.embedded[:, 1:]), features.shape[1]
        hidden, (places, weight) = self.run(features, tokens), batch.chains(0, length)
        state, out = self.begin(hidden[:, places], tokens[:, places])
        yield Out(out, 1, weight, places)
        for i in range(1, min(self.depth, length)):
            before, (places, weight) = places, batch.chains(i, length)
            state, out = self.step(state[:, torch.searchsorted(before, places)], tokens[:, places + i])
            yield Out(out, i + 1, weight, places)

    def cost(self) -> tuple[int, int]:
        whole, _ = super().cost()
        each = sum(value.numel() for name in self.EACH for value in self.get_submodule(name).parameters())
        return whole + (self.depth - 1) * each, self.depth

    def probe(self, batch: Batch) -> Tensor:
        """[B, n - 1, (reads + 1) * W]: unit states and the token behind each, what a first token can be told from."""
        tokens: Tensor = self.token_norm(batch.embedded[:, 1:])
        return torch.cat((self.units(batch.read(self.reads)[:, :-1]), tokens), -1)
