"""The target's hidden states over texts: a head trains on them.

A whole text is one wide pass, which is two fifths of a training step of the default model. So they are kept from one
epoch to the next, in the model's dtype and so to the same bits, while they fit into a part of the memory (of the
default model 1.2 GB for a million tokens); the others are computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspec.cache.dense import Dense
from longspec.machine.system import available_bytes
from longspec.model.decoder import Chunk, Decoder, Rows

__all__ = ["Features", "features"]

CHUNK = 512
"""Rows of a pass."""

_SHARE = 0.25  # of the memory that is free at first


class Features:
    """Those of texts that come again and again. room: bytes for what is kept; a share of what is free, if left out."""

    def __init__(self, decoder: Decoder, room: int | None = None) -> None:
        self._decoder = decoder
        self._room = int(available_bytes() * _SHARE) if room is None else room
        self._kept: dict[int, Tensor] = {}

    def of(self, number: int, tokens: Sequence[int]) -> Tensor:
        """[n, width] of the text with this number."""
        found = self._kept.get(number)
        if found is None:
            found = features(self._decoder, tokens)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[number] = found
        return found


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
