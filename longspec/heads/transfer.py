"""Hidden Transfer (2404.12022): linear maps make pseudo hidden states of the positions ahead, which run on through the
target's own last layers.

    row k of position t:  W_k h_t, joining after layer l_k;  the target's layers l_k to L;  then its LM head

h_t is the target's state after l_k layers. Row k stands at position t + k, reads the text up to t and t's rows up to
itself, and foretells the target's last state there. Nothing but the W_k is trained, through the frozen layers; as in
the paper later rows join later (after 20, 22 and 24 of 30 layers). They begin with the least squares of h_{t+k} on h_t.

In the paper the rows run in the pass that verifies, beside each of its nodes. Here they have a pass of their own over
the newest position alone (`longspec.drafters.heads.hidden_transfer`): it reads a third of the layers once more, and the
verification has no row more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from longspec.errors import UsageError
from longspec.heads.head import Batch, Fit, Head, Out, unit
from longspec.heads.layers import Norm
from longspec.model.config import Config

__all__ = ["Transfer"]


class Transfer(Head):
    """The last of `reads` is the target's number of layers; the others are where rows join."""

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        if len(reads) < 2:
            raise UsageError("A model of one layer has none where rows could join; train another kind of head for it.")
        self.maps = nn.ModuleList(nn.Linear(config.width, config.width, bias=False) for _ in range(depth))
        self.norm = Norm(config.width, config.eps)
        for each in self.maps:
            nn.init.eye_(each.weight)  # type: ignore[arg-type]

    @classmethod
    def reads_of(cls, layers: int) -> tuple[int, ...]:
        return (*sorted({layers * 2 // 3, layers * 11 // 15, layers * 4 // 5} - {0}), layers)

    @property
    def joins(self) -> list[int]:
        """Of each depth, after how many of the target's layers its row joins."""
        places = self.reads[:-1]
        return [places[min(i, len(places) - 1)] for i in range(self.depth)]

    def joining(self, layer: int, states: Tensor) -> list[Tensor]:
        """The rows [..., W] that join after a layer, of its states [..., W], shallow ones first."""
        return [each(states) for each, join in zip(self.maps, self.joins, strict=True) if join == layer]

    def outputs(self, batch: Batch) -> Iterator[Out]:
        assert batch.beside is not None
        text = batch.states[self.reads[0]]
        first, _ = batch.chains(0, text.shape[1])
        rows = {layer: self.joining(layer, batch.states[layer][:, first]) for layer in dict.fromkeys(self.joins)}
        made = batch.beside(text, rows, first)
        for i in range(self.depth):
            places, weight = batch.chains(i, text.shape[1] + i)
            yield Out(made[:, torch.searchsorted(first, places), i], i + 1, weight, places)

    def start(self, fit: Fit) -> None:
        for i, (each, layer) in enumerate(zip(self.maps, self.joins, strict=True)):
            each.weight.copy_(fit(lambda batch, layer=layer: unit(batch.states[layer]), i + 1, layer))  # type: ignore[operator, misc]

    def cost(self) -> tuple[int, int]:
        """With the target's layers that a draft runs through, of the head's own config: attention and a gated MLP."""
        own, _ = super().cost()
        c = self.config
        layer = 2 * c.width * (c.heads + c.key_heads) * c.head_dim + 3 * c.width * c.mlp_width
        return own + (self.reads[-1] - self.reads[0]) * layer, 1
