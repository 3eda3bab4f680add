"""Heads that draft all depths at once, each without the tokens that are drafted before it.

A subclass says `all_depths`, of the states of a position and the token behind it; training and
`longspec.drafters.heads.all_depths` run that.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from longspec.heads.head import DECAY, Batch, Head, Out

__all__ = ["AllDepths"]


class AllDepths(Head):
    def all_depths(self, features: Tensor, tokens: Tensor) -> Tensor:
        """[..., depth, W]: an output for each depth. features: [..., reads * W], a position's states; tokens: [..., W],
        the embedding of the token behind it.
        """
        raise NotImplementedError

    def outputs(self, batch: Batch) -> Iterator[Out]:
        made = self.all_depths(batch.read(self.reads)[:, :-1], batch.embedded[:, 1:])
        length = made.shape[1]
        for i in range(min(self.depth, length)):
            yield Out(made[:, : length - i, i], i + 1, DECAY**i)
