"""A text as the target sees it: hidden states and distributions at every position; and several of them as a batch.

Takes a target and tokens; gives what a head reads and what it is to foresee. Knows no folder and no head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from longspec.cache import CACHES
from longspec.heads.head import Batch
from longspec.model.beside import beside
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.load import Model, native_dtype

__all__ = ["TOP", "Seen", "Target", "batch_of", "halves", "see"]

CHUNK = 512
"""Token positions of a forward pass."""

TOP = 64
"""Tokens of a distribution that are kept, the likeliest; of the others their sum."""

_PIECE = 128  # rows of logits that are computed at once


@dataclass(frozen=True, slots=True)
class Seen:
    prompt: int  # number of prompt tokens
    tokens: Tensor  # [n] int32
    states: Mapping[int, Tensor]  # by number of target layers: [n, W] bf16, before any norm
    top: Tensor  # [n, k] int32: the likeliest next tokens, the likeliest first
    probs: Tensor  # [n, k] fp16: their probabilities; 0 where the next token is still the prompt's
    rest: Tensor  # [n] fp32: the probability of all others; 1 there


@dataclass(frozen=True, slots=True)
class Target:
    """What a batch's head is to foresee: of each position the target's last state and its next token."""

    tokens: Tensor  # [B, n] int64, 0 behind a text's end
    counted: Tensor  # [B, n] bool: the next token is the answer's
    final: Tensor  # [B, n, W], after the final norm
    top: Tensor  # [B, n, k] int64
    probs: Tensor  # [B, n, k]
    rest: Tensor  # [B, n]


@torch.no_grad()
def see(
    model: Model, tokens: Sequence[int], prompt: int, layers: Sequence[int], states: Mapping[int, Tensor] | None = None
) -> Seen:
    """Run a text through the target, as decoding would. layers: whose states are kept, beside the last one's. states:
    those, [n, W], where decoding has them.

    A head is told nothing of the prompt's own tokens, so their rows aren't multiplied with the LM head.
    """
    decoder = model.decoder
    whole = _run(decoder, tokens, layers) if states is None else states
    last = whole[decoder.config.layers].to(decoder.dtype)
    pieces = [_likeliest(decoder.logits(piece)) for piece in torch.split(last[prompt - 1 :], _PIECE)]
    top, probs, rest = (
        torch.cat([told[0].new_full((prompt - 1, *told[0].shape[1:]), nothing), *told])
        for nothing, told in zip((0, 0, 1), zip(*pieces, strict=True), strict=True)
    )
    kept = {layer: value.to(torch.bfloat16) for layer, value in whole.items()}
    return Seen(prompt, torch.tensor(tokens, dtype=torch.int32), kept, top, probs, rest)


def _run(decoder: Decoder, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
    """Hidden states [n, W] of a text after these of the target's layers, and after the last one."""
    cache, last, made = CACHES["dense"](decoder.shape), decoder.config.layers, []
    for start in range(0, len(tokens), CHUNK):
        own = tokens[start : start + CHUNK]
        stage = cache.open()
        staged = stage.add(range(-1, len(own) - 1))
        rows = Rows.of([Chunk(stage, staged, own, start, False)], decoder.device)
        hidden = decoder.embed(rows.tokens)
        states = {0: hidden}
        for first, until in pairwise(sorted({0, *layers, last})):
            states[until] = hidden = decoder.forward(rows, hidden if first else None, first, until)
        cache.commit(stage, range(len(own)))
        made.append(states)
    return {layer: torch.cat([each[layer] for each in made]) for layer in {*layers, last}}


def halves(model: Model) -> bool:
    """Whether a head's products run in bf16: where the target's rows are, and the device multiplies it natively. torch
    emulates it on a processor without such instructions.
    """
    return model.decoder.dtype == torch.bfloat16 and native_dtype(model.decoder.device) == "bf16"


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    probs = torch.softmax(logits.float(), -1)
    best = probs.topk(min(TOP, probs.shape[-1]), -1)
    rest = (1 - best.values.sum(-1)).clamp_min(0.0)
    return best.indices.int(), best.values.half(), rest


def batch_of(
    model: Model, texts: Sequence[Seen], layers: Sequence[int], step: int | None = None
) -> tuple[Batch, Target]:
    """Texts side by side, in fp32 on the target's device. layers: whose states a head reads. step: of a training, by
    whose number the positions are drawn behind which a draft is deep; None: all are.
    """
    decoder, longest = model.decoder, max(len(text.tokens) for text in texts)

    def padded(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        whole = torch.zeros(len(texts), longest, *tensors[0].shape[1:], dtype=dtype, device=decoder.device)
        for row, tensor in zip(whole, tensors, strict=True):
            row[: len(tensor)] = tensor
        return whole

    tokens = padded([text.tokens for text in texts], torch.int64)
    last = decoder.config.layers
    embedded = decoder.embed(tokens).float()
    states = {0: embedded}
    for layer in {*layers, last} - {0}:
        states[layer] = padded([text.states[layer] for text in texts], torch.float32)
    places = torch.arange(longest, device=decoder.device)
    spans = torch.tensor([(text.prompt - 1, len(text.tokens)) for text in texts], device=decoder.device)
    target = Target(
        tokens,
        (places >= spans[:, :1]) & (places < spans[:, 1:]),
        decoder.normed(states[last].to(decoder.dtype)).float(),
        padded([text.top for text in texts], torch.int64),
        padded([text.probs for text in texts], torch.float32),
        padded([text.rest for text in texts], torch.float32),
    )
    drawn = None
    if step is not None:
        before = target.counted[:, 1:].any(0).nonzero()[:, 0]
        drawn = before[torch.randperm(len(before), generator=torch.Generator().manual_seed(step)).to(before.device)]
    return Batch(states, embedded, drawn, partial(beside, decoder)), target
