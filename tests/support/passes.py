"""One forward pass by hand, for tests that look below the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspec.cache.stage import Cache, Stage
from longspec.model.decoder import Decoder, Rows, Span

TOKENS = torch.randint(3, 96, (300,), generator=torch.Generator().manual_seed(2)).tolist()
TOLERANCE = 2e-5  # fp32; merged parts and other shapes round differently


def feed(
    model: Decoder, cache: Cache, tokens: Sequence[int], parents: Sequence[int] | None = None, *, long: bool = False
) -> tuple[Any, Tensor]:
    """Stage these tokens (a chain where no parents are given): the stage, and logits [r, V]."""
    stage: Stage = cache.open()
    rows = stage.add(range(-1, len(tokens) - 1) if parents is None else parents)
    positions = torch.tensor([cache.length + depth for depth in stage.depths[rows]])
    spans = [Span(stage, rows, slice(0, len(tokens)))]
    hidden = model.forward(Rows(torch.tensor(tokens), positions, torch.full((len(tokens),), long), spans))
    return stage, model.logits(hidden)


def write(model: Decoder, cache: Cache, tokens: Sequence[int], *, long: bool = False) -> Tensor:
    """Feed and commit all of them: logits [r, V]."""
    stage, logits = feed(model, cache, tokens, long=long)
    cache.commit(stage, range(len(tokens)))
    return logits


def filled(model: Decoder, kind: Any, length: int) -> Any:
    """A cache of this kind that holds the first tokens."""
    cache = kind(model.shape)
    if length:
        write(model, cache, TOKENS[:length])
    return cache


def continuation(model: Decoder, cache: Cache) -> Tensor:
    """Logits [5, V] of the next tokens, which stay out of the cache."""
    return feed(model, cache, TOKENS[cache.length : cache.length + 5])[1]
