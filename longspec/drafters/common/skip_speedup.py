"""What it is worth to leave sub-layers out: the expected speed-up of a set, and what it is computed from.

    gain        of a set: expected, from how often it agrees with the target and what its passes take
    Prices      what passes take, by what they run: measured, or by the bytes that they read
    agreement   how many tokens of a text the skipping model writes too
    influence   how far each sub-layer moves the hidden state: where to begin a search

Knows decoders and texts, no drafter and no clock.

Letters: a the share of tokens that the skipping model writes as the target did, c a skipping pass's share of a whole
one's time, r what a further row costs in whole passes, g tokens of a draft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longspec.cache.stage import Cache
from longspec.model.decoder import Chunk, Decoder, Rows, Skip

__all__ = ["CHAIN", "MOST", "ROW", "Prices", "agreement", "gain", "influence", "nested", "swapped", "united"]

MOST = 8
"""The longest draft that a gain is expected of."""

CHAIN = 8
"""Rows that an agreement is counted over at once: each reads exact rows, and inexact ones of its own chain, as a draft
does."""

ROW = 0.04
"""A further row of a pass, in passes, as long as nobody measured it (bf16 on a CPU: 0.03)."""

_UNFUSED = 2.3  # a sub-layer alone runs through torch's operators, which take that much longer than the fused kernel


def gain(agreed: float, share: float, row: float = ROW, most: int = MOST) -> float:
    """Expected tokens per second over those of plain decoding, at the best length of a draft; below 1 it loses.

    A step of a draft of g brings 1 + a + ... + a^g tokens, and takes g * c + 1 + g * r passes.
    """
    best, tokens = 0.0, 1.0
    for length in range(1, most + 1):
        tokens += agreed**length
        best = max(best, tokens / (length * share + 1 + length * row))
    return best


@dataclass(frozen=True, slots=True)
class Prices:
    """What a pass of one row takes, layer by layer, in any unit of time."""

    whole: tuple[float, ...]
    attention: tuple[float, ...]  # of a layer whose MLP is left out
    mlp: tuple[float, ...]  # of a layer whose attention is left out
    rest: float  # embedding, last norm, head
    row: float = ROW

    @classmethod
    def by_bytes(cls, decoder: Decoder, context: int) -> Prices:
        """By the weights, keys and values that a pass reads behind so many rows: what bounds it on most machines."""
        c, size = decoder.config, decoder.dtype.itemsize
        heads = 2 * (c.heads + c.key_heads) * c.head_dim * c.width * size
        mlp = 3 * c.width * c.mlp_width * size
        row = 2 * c.key_heads * c.head_dim * size
        attention = [heads + row * min(context, window or context) for window in c.windows]
        slower = _UNFUSED if decoder.slow is None else 1.0
        return cls(
            tuple(read + mlp for read in attention),
            tuple(slower * read for read in attention),
            (slower * mlp,) * len(attention),
            c.vocabulary * c.width * size,
        )

    @property
    def total(self) -> float:
        return sum(self.whole) + self.rest

    def share(self, skip: Skip) -> float:
        """c: what a pass without these sub-layers takes of a whole one."""
        left = self.rest
        for i, whole in enumerate(self.whole):
            if i in skip.attention:
                left += 0.0 if i in skip.mlp else self.mlp[i]
            else:
                left += self.attention[i] if i in skip.mlp else whole
        return left / self.total

    def units(self) -> list[Skip]:
        """What can be left out by itself: sub-layers, and whole layers where one of two alone saves next to nothing."""
        units = []
        for i, whole in enumerate(self.whole):
            one = frozenset({i})
            if max(self.attention[i], self.mlp[i]) < 0.95 * whole:
                units += [Skip(attention=one), Skip(mlp=one)]
            else:
                units.append(Skip(one, one))
        return units


def united(skips: Sequence[Skip]) -> Skip:
    """What any of them leaves out."""
    return Skip(frozenset().union(*(s.attention for s in skips)), frozenset().union(*(s.mlp for s in skips)))


def swapped(skip: Skip, unit: Skip) -> Skip:
    """With the unit's sub-layers left out where they were not, and run where they were."""
    return Skip(skip.attention ^ unit.attention, skip.mlp ^ unit.mlp)


@torch.inference_mode()
def agreement(decoder: Decoder, cache: Cache, tokens: Sequence[int], count: int, skip: Skip, *, long: bool) -> int:
    """How many of the text's last `count` tokens the skipping model thinks likeliest too, in one pass.

    cache: holds all rows of the text but the last at least; its forks are read, and dropped.
    """
    rows = Rows.of(list(_chunks(cache, tokens, count, CHAIN, long)), decoder.device)
    likeliest = decoder.logits(decoder.forward(rows, skip=skip)).argmax(-1)
    written = torch.tensor(tokens[len(tokens) - count :], device=decoder.device)
    return int((likeliest == written).sum())


@torch.inference_mode()
def influence(
    decoder: Decoder, cache: Cache, tokens: Sequence[int], count: int, *, long: bool
) -> tuple[list[float], list[float]]:
    """How far each layer's attention, and each layer's MLP, moves the hidden state of the last `count` rows.

    As a share of its length, on average: what moves it least is missed least.
    """
    rows = Rows.of(list(_chunks(cache, tokens, count, count, long)), decoder.device)
    hidden = decoder.forward(rows, last=0)
    attention, mlp = [], []
    for i in range(decoder.config.layers):
        one = frozenset({i})
        between = decoder.forward(rows, hidden, i, i + 1, Skip(mlp=one))
        after = decoder.forward(rows, between, i, i + 1, Skip(attention=one))
        attention.append(_moved(hidden, between))
        mlp.append(_moved(between, after))
        hidden = after
    return attention, mlp


def nested(prices: Prices, moved: tuple[Sequence[float], Sequence[float]]) -> list[Skip]:
    """The prices' units, in the order in which to leave them out: least influence for what it saves first."""

    def loss(unit: Skip) -> float:
        lost = sum(moved[0][i] for i in unit.attention) + sum(moved[1][i] for i in unit.mlp)
        return lost / max(1 - prices.share(unit), 1e-9)

    return sorted(prices.units(), key=loss)


def _chunks(cache: Cache, tokens: Sequence[int], count: int, chain: int, long: bool) -> Iterator[Chunk]:
    """The rows that the last `count` tokens follow, in chains that go on from the text's own rows."""
    end = len(tokens) - 1
    for start in range(end - count, end, chain):
        stage = cache.fork(start).open()
        own = tokens[start : min(start + chain, end)]
        yield Chunk(stage, stage.add(range(-1, len(own) - 1)), own, start, long)


def _moved(before: Any, after: Any) -> float:
    change = (after - before).float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-9)
    return float(change.mean())
