"""Expected speed-up of skipping a set of sub-layers, and the quantities that it is computed from.

    gain        expected speed-up of a set, from its agreement with the target and its relative pass time
    Prices      relative time of forward passes by the sub-layers that they run: measured, or by the bytes read
    agreement   number of a sequence's tokens that the skipping model would choose too
    influence   relative change of the hidden state by each sub-layer: the search's initial order

Knows decoders and token sequences, no drafter and no clock.

Symbols: a, share of tokens that the skipping model chooses as the target did; c, time of a skipping forward pass over
that of a full one; r, time of a further token position over that of a full pass; g, tokens of a draft.
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
"""Longest draft, in tokens, that `gain` considers."""

CHAIN = 8
"""Chain length for measuring agreement: within a chain positions read the skipping model's own keys and values, before
it the target's, as in a draft."""

ROW = 0.04
"""Default of r: time of a further token position, in full forward passes."""

_UNFUSED = 2.3  # time of a sub-layer in torch's operators over that in the fused kernel, which runs whole layers only


def gain(agreed: float, share: float, row: float = ROW, most: int = MOST) -> float:
    """Expected speed-up over plain decoding at the best draft length, with a = agreed, c = share, r = row.

    A step with a draft of g tokens brings 1 + a + ... + a^g tokens, and takes the time of g * c + 1 + g * r passes.
    """
    best, tokens = 0.0, 1.0
    for length in range(1, most + 1):
        tokens += agreed**length
        best = max(best, tokens / (length * share + 1 + length * row))
    return best


@dataclass(frozen=True, slots=True)
class Prices:
    """Time of a forward pass of one token position, by layer, in any unit."""

    whole: tuple[float, ...]  # both sub-layers
    attention: tuple[float, ...]  # a layer whose MLP is skipped
    mlp: tuple[float, ...]  # a layer whose attention is skipped
    rest: float  # embedding, final norm, LM head
    row: float = ROW  # r

    @classmethod
    def by_bytes(cls, decoder: Decoder, context: int) -> Prices:
        """Estimate from the bytes of weights, keys and values that a pass reads at `context` cached positions."""
        c, size = decoder.config, decoder.dtype.itemsize
        heads = [c.head_channels(i) * c.width * size for i in range(c.layers)]
        mlps = [3 * c.width * c.channels(i, active=True) * size for i in range(c.layers)]
        row = 2 * c.key_heads * c.head_dim * size
        read = [row * min(context, window or context) for window in c.windows]
        attention = list(map(sum, zip(heads, read, strict=True)))
        slower = _UNFUSED if decoder.slow is None else 1.0
        return cls(
            tuple(map(sum, zip(attention, mlps, strict=True))),
            tuple(slower * each for each in attention),
            tuple(slower * each for each in mlps),
            c.vocabulary * c.width * size,
        )

    @property
    def total(self) -> float:
        return sum(self.whole) + self.rest

    def share(self, skip: Skip) -> float:
        """c: time of a pass without these sub-layers over that of a full pass."""
        left = self.rest
        for i, whole in enumerate(self.whole):
            if i in skip.attention:
                left += 0.0 if i in skip.mlp else self.mlp[i]
            else:
                left += self.attention[i] if i in skip.mlp else whole
        return left / self.total

    def units(self) -> list[Skip]:
        """The smallest sets worth skipping: a sub-layer, or a whole layer if one of its two alone saves too little."""
        units = []
        for i, whole in enumerate(self.whole):
            one = frozenset({i})
            if max(self.attention[i], self.mlp[i]) < 0.95 * whole:
                units += [Skip(attention=one), Skip(mlp=one)]
            else:
                units.append(Skip(one, one))
        return units


def united(skips: Sequence[Skip]) -> Skip:
    """Union of the sets."""
    return Skip(frozenset().union(*(s.attention for s in skips)), frozenset().union(*(s.mlp for s in skips)))


def swapped(skip: Skip, unit: Skip) -> Skip:
    """Symmetric difference of the sets: the unit's sub-layers are toggled."""
    return Skip(skip.attention ^ unit.attention, skip.mlp ^ unit.mlp)


@torch.inference_mode()
def agreement(decoder: Decoder, cache: Cache, tokens: Sequence[int], count: int, skip: Skip, *, long: bool) -> int:
    """Number of the last `count` tokens that are the skipping model's argmax too, from one forward pass.

    cache: must hold all positions but the last. Only forks of it are used.
    """
    rows = Rows.of(list(_chunks(cache, tokens, count, CHAIN, long)), decoder.device)
    likeliest = decoder.logits(decoder.forward(rows, skip=skip)).argmax(-1)
    written = torch.tensor(tokens[len(tokens) - count :], device=decoder.device)
    return int((likeliest == written).sum())


@torch.inference_mode()
def influence(
    decoder: Decoder, cache: Cache, tokens: Sequence[int], count: int, *, long: bool
) -> tuple[list[float], list[float]]:
    """Relative change |out - in| / |in| of the hidden state by each layer's attention, and by each layer's MLP.

    Averaged over the last `count` positions. Sub-layers with the least influence are skipped first.
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
    """All units in the order in which to skip them: by influence over time saved, ascending."""

    def loss(unit: Skip) -> float:
        lost = sum(moved[0][i] for i in unit.attention) + sum(moved[1][i] for i in unit.mlp)
        return lost / max(1 - prices.share(unit), 1e-9)

    return sorted(prices.units(), key=loss)


def _chunks(cache: Cache, tokens: Sequence[int], count: int, chain: int, long: bool) -> Iterator[Chunk]:
    """The positions that predict the last `count` tokens, as chains of `chain`, each on a fork of the cache."""
    end = len(tokens) - 1
    for start in range(end - count, end, chain):
        stage = cache.fork(start).open()
        own = tokens[start : min(start + chain, end)]
        yield Chunk(stage, stage.add(range(-1, len(own) - 1)), own, start, long)


def _moved(before: Any, after: Any) -> float:
    change = (after - before).float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-9)
    return float(change.mean())
