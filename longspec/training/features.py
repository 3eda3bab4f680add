"""The target's hidden states over a text, computed when they are needed: a head trains on them.

Storing them would take width times two bytes a token (the default model: 1.2 GB for a million), and computing them is a
small part of a training step, since a whole text is one wide pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspec.cache.dense import Dense
from longspec.model.decoder import Chunk, Decoder, Rows

__all__ = ["features"]

CHUNK = 512
"""Rows of a pass."""


@torch.no_grad()
def features(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """[n, width]: the hidden state behind each token, before the final norm."""
    cache, made = Dense(decoder.shape), []
    for start in range(0, len(tokens), CHUNK):
        own = tokens[start : start + CHUNK]
        stage = cache.open()
        staged = stage.add(range(-1, len(own) - 1))
        made.append(decoder.forward(Rows.of([Chunk(stage, staged, own, start, False)], decoder.device)))
        cache.commit(stage, range(len(own)))
    return torch.cat(made)
