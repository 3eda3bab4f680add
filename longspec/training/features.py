"""The target's hidden states over training texts: the inputs and regression targets of a head.

Computing them is a large part of a training step. They are kept from one epoch to the next, bit for bit in the model's
dtype, as long as they fit into a quarter of the free memory; the others are recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspec.cache import CACHES
from longspec.machine.system import available_bytes
from longspec.model.decoder import Chunk, Decoder, Rows

__all__ = ["Features", "features"]

CHUNK = 512
"""Token positions of a forward pass."""

_SHARE = 0.25  # of the memory that is free at the start


class Features:
    """Cache of hidden states by text. room: its capacity in bytes; default: a share (`_SHARE`) of the free memory."""

    def __init__(self, decoder: Decoder, room: int | None = None) -> None:
        self._decoder = decoder
        self._room = int(available_bytes() * _SHARE) if room is None else room
        self._kept: dict[int, Tensor] = {}

    def of(self, number: int, tokens: Sequence[int]) -> Tensor:
        """Hidden states [n, width] of the text with this number."""
        found = self._kept.get(number)
        if found is None:
            found = features(self._decoder, tokens)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[number] = found
        return found


@torch.no_grad()
def features(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """Hidden states [n, width], one for each token, before the final norm."""
    cache, made = CACHES["dense"](decoder.shape), []
    for start in range(0, len(tokens), CHUNK):
        own = tokens[start : start + CHUNK]
        stage = cache.open()
        staged = stage.add(range(-1, len(own) - 1))
        made.append(decoder.forward(Rows.of([Chunk(stage, staged, own, start, False)], decoder.device)))
        cache.commit(stage, range(len(own)))
    return torch.cat(made)
