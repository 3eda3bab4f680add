"""Heads with one layer over the text, whose keys and values are kept, that draft all depths in the same pass.

Training runs a subclass's `outputs`. `longspec.drafters.one_pass` runs `enter`, the layer in a `Decoder`, and
`drafted`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from longspec.heads.head import Head, unit

__all__ = ["OnePass"]


class OnePass(Head):
    LAYERS = 1
    TREE: ClassVar[bool] = True
    """Whether the depths' candidates are multiplied out; else a draft is a chain of the likeliest ones."""

    ATTENTION_ONLY: ClassVar[bool] = False
    """Whether the layer's MLP isn't run over the text."""

    layers: nn.ModuleList

    @property
    def masks(self) -> Tensor | None:
        """[m, W], inputs of the layer for rows behind a text's newest position."""
        return None

    def enter(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Input of the layer [..., W], from each position's states [..., reads * W] and the embedding of the token
        behind it [..., W].
        """
        raise NotImplementedError

    def drafted(self, hidden: Tensor) -> Tensor:
        """[B, depth, W]: an output for each depth, from the layer's for the newest position [B, W], or with masks for
        it and these [B, 1 + m, W].
        """
        raise NotImplementedError

    def units(self, features: Tensor) -> Tensor:
        """Each layer's states of a root mean square of 1: [..., reads * W]."""
        return unit(features.view(*features.shape[:-1], -1, self.config.width)).flatten(-2)

    def told(self, features: Tensor, tokens: Tensor) -> Tensor:
        """[..., (reads + 1) * W]: these and the token behind them, what a first token can be told from."""
        return torch.cat((self.units(features), unit(tokens)), -1)
