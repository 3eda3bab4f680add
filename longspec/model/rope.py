"""Rotary position embedding (RoPE): the frequencies of each kind, and the rotation.

Takes a `Rope` and positions, gives cosines and sines in fp32; knows no layer. Kinds: default (Su et al., 2104.09864),
linear (positions divided), proportional (the first pairs of a head only), llama3 (long wavelengths divided), yarn
(2309.00071), longrope (2402.13753).

A longrope model has two sets of frequencies, one for short sequences and one for those beyond its original context.
The set is fixed before a sequence's first position, by its planned maximum length: switching during decoding would
leave keys of both kinds in one cache. (llama.cpp and vLLM decide in the same way, by the context requested.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspec.model.config import Rope

__all__ = ["Rotation", "frequencies", "rotate"]


class Rotation:
    """A rope's frequencies on a device."""

    def __init__(self, rope: Rope, device: torch.device) -> None:
        short, self._factor = frequencies(rope)
        both = torch.stack((short, frequencies(rope, long=True)[0])) if rope.kind == "longrope" else short[None]
        self._frequencies = torch.cat((-both, both), -1).to(device)  # [1 or 2, dims], of the signed sines
        self.first_context = int(rope.get("original_max_position_embeddings", 0)) if len(both) == 2 else None

    def __call__(self, positions: Tensor, long: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [r, 1, dims] for `rotate`. long: [r] bool, positions of a sequence planned to be
        long.
        """
        chosen = self._frequencies[long.long()] if len(self._frequencies) == 2 else self._frequencies
        angles = positions[:, None, None] * chosen[:, None]
        # Not by cos and sin: these wake MKL's threads for any number of values, which then spin for milliseconds where
        # the kernels' team works (a pass of a 1.5B model on two cores took 40 ms and not 32).
        turned = torch.polar(torch.full_like(angles, self._factor), angles)
        return turned.real.to(dtype).contiguous(), turned.imag.to(dtype).contiguous()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of heads [r, h, D]: (a, b) becomes (a cos - b sin, b cos + a sin) in halves."""
    dims = cos.shape[-1]
    turned = heads[..., :dims]
    half = dims // 2
    swapped = torch.cat((turned[..., half:], turned[..., :half]), -1)
    out = torch.addcmul(turned * cos, swapped, sin)
    return out if dims == heads.shape[-1] else torch.cat((out, heads[..., dims:]), -1)


def frequencies(rope: Rope, long: bool = False) -> tuple[Tensor, float]:
    """Radians per position [dims / 2] in fp32, and the factor on cosines and sines."""
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.int64).float() / rope.dims
    plain = 1.0 / rope.theta**exponents
    original = rope.get("original_max_position_embeddings", rope.context)
    match rope.kind:
        case "linear":
            return plain / rope.get("factor", 1.0), 1.0
        case "proportional":
            turned = int(rope.get("partial_rotary_factor", 1.0) * rope.dims / 2 + 1e-6)
            plain = torch.cat((plain[:turned], torch.zeros(len(plain) - turned)))
            return plain / rope.get("factor", 1.0), 1.0
        case "llama3":
            return _llama3(rope, plain, original), 1.0
        case "yarn":
            return _yarn(rope, plain, original)
        case "longrope":
            factors = torch.tensor(rope.get("long_factor" if long else "short_factor"), dtype=torch.float32)
            factor = rope.get("factor", rope.context / original)
            default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            return 1.0 / (factors * rope.theta**exponents), rope.get("attention_factor", default)
        case _:
            return plain, 1.0


def _llama3(rope: Rope, plain: Tensor, original: int) -> Tensor:
    """Keep wavelengths up to original / high, stretch those from original / low on, and blend between."""
    factor, low, high = (float(rope.get(name)) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelengths = 2 * math.pi / plain
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(rope: Rope, plain: Tensor, original: int) -> tuple[Tensor, float]:
    """Keep dimensions that rotate often within the original context, stretch those that hardly rotate, with a linear
    ramp between.
    """
    factor = rope.get("factor", rope.context / original)

    def dimension(turns: float) -> float:  # the one that rotates so often within the original context
        return rope.dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.get("beta_fast", 32)), dimension(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    ramp = ((torch.arange(rope.dims // 2).float() - low) / (max(high - low, 0.001))).clamp(0, 1)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scaled, over_all = rope.get("mscale"), rope.get("mscale_all_dim")
    default = mscale(scaled) / mscale(over_all) if scaled and over_all else mscale(1.0)
    return plain / factor * ramp + plain * (1 - ramp), rope.get("attention_factor", default)
