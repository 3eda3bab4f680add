"""Heads that draft all depths at once, each without the tokens that are drafted before it.

A subclass says `all_depths`, of the states of a position and the token behind it; training and
`longspec.drafters.heads.all_depths` run that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longspec.heads.head import Batch, Head, Out

__all__ = ["AllDepths"]


class AllDepths(Head):
    def all_depths(self, features: Tensor, tokens: Tensor) -> Tensor:
        """[..., depth, W]: an output for each depth. features: [..., reads * W], a position's states; tokens: [..., W],
        the embedding of the token behind it.
        """
        raise NotImplementedError

    def outputs(self, batch: Batch) -> Iterator[Out]:
        features, tokens = batch.read(self.reads)[:, :-1], batch.embedded[:, 1:]
        first, length = batch.chains(0, features.shape[1])[0], features.shape[1]
        made = self.all_depths(features[:, first], tokens[:, first])
        for i in range(min(self.depth, length)):
            places, weight = batch.chains(i, length)
            yield Out(made[:, torch.searchsorted(first, places), i], i + 1, weight, places)
