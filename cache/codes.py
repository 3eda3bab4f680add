"""Quantization of blocks of keys and values to integer codes, and back.

Takes whole blocks of 64 token positions, gives codes and fp16 scales; knows no sequence, stage or model. Keys are
quantized per channel over a block's positions, since keys have outlier channels; values per token over its channels
(KIVI, 2402.02750). A block is encoded once, from keys and values in the cache's dtype.

    asymmetric   value = low + step * code           code in 0 .. 2^bits - 1; step and low in fp16
    symmetric    value = step * code                 code in -127 .. 127, 8 bits; step in fp16
    grouped      value = step * (low / 4 + code)     code in 0 .. 3, for 32 values; step and low in a byte each

Symbols: K key heads, b blocks, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from longspec.cache.stage import BLOCK, Shape

__all__ = ["Codec", "Codes", "DualCodec", "GroupCodec", "pack", "unpack"]

Codes = tuple[Tensor, ...]
"""A codec's tensors for b blocks, each [K, b, ...]: key codes and scales, then value codes and scales."""

_LARGEST = 65504.0  # greatest finite fp16

_GROUP = 32
_MOST_LOW = 30.0  # steps from 0 to a group's middle: a low is at most 127 quarter steps


@dataclass(frozen=True, slots=True)
class Codec:
    """A quantizer of blocks, with one code for each value."""

    bits: int  # 2, 4 or 8
    symmetric: bool = False  # 8 bits only

    def empty(self, shape: Shape, blocks: int) -> Codes:
        """Uninitialised tensors for the codes of `blocks` blocks of one layer."""
        k, d = shape.key_heads, shape.head_dim
        codes = torch.int8 if self.symmetric else torch.uint8
        scales = 1 if self.symmetric else 2
        sizes: Sequence[tuple[tuple[int, ...], torch.dtype]] = (
            ((BLOCK, d * self.bits // 8), codes),
            *[((1, d), torch.float16)] * scales,
            ((BLOCK, d * self.bits // 8), codes),
            *[((BLOCK, 1), torch.float16)] * scales,
        )
        return tuple(shape.empty((k, blocks, *size), dtype) for size, dtype in sizes)

    def encode(self, keys: Tensor, values: Tensor) -> Codes:
        """Quantize keys and values, each [K, b, 64, D]."""
        return (*self._encode(keys, -2), *self._encode(values, -1))

    def decode(self, codes: Codes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Dequantize to keys and values, each [K, b * 64, D] in `dtype`."""
        half = len(codes) // 2
        keys, values = self._decode(codes[:half], dtype), self._decode(codes[half:], dtype)
        return keys.flatten(1, 2), values.flatten(1, 2)

    def upper(self, codes: Codes) -> tuple[Codec, Codes]:
        """A coarser codec and its codes of the same blocks, for drafting; here the codes themselves."""
        return self, codes

    def _encode(self, rows: Tensor, axis: int) -> Codes:
        rows = rows.float()
        if self.symmetric:
            step = (rows.abs().amax(axis, keepdim=True) / 127).clamp(max=_LARGEST).half()
            return _nearest(rows, step, -127, 127).to(torch.int8), step
        low = rows.amin(axis, keepdim=True).clamp(-_LARGEST, _LARGEST).half()
        top = (1 << self.bits) - 1
        step = ((rows.amax(axis, keepdim=True) - low.float()) / top).clamp(0, _LARGEST).half()
        return pack(_nearest(rows - low.float(), step, 0, top).to(torch.uint8), self.bits), step, low

    def _decode(self, codes: Codes, dtype: torch.dtype) -> Tensor:
        if self.symmetric:
            return codes[0].to(dtype).mul_(codes[1].to(dtype))
        return unpack(codes[0], self.bits).to(dtype).mul_(codes[1].to(dtype)).add_(codes[2].to(dtype))


@dataclass(frozen=True, slots=True)
class DualCodec(Codec):
    """8-bit codes in two planes of 4 bits (QuantSpec, 2502.10424): code = 16 * upper + lower.

    The target reads both planes. A drafter may read the upper one alone (`upper`), which stands for the middle of the
    16 codes that share its bits.
    """

    bits: int = 8

    def empty(self, shape: Shape, blocks: int) -> Codes:
        half = Codec(4).empty(shape, blocks)
        return (half[0], torch.empty_like(half[0]), *half[1:4], torch.empty_like(half[3]), *half[4:])

    def _encode(self, rows: Tensor, axis: int) -> Codes:
        codes, step, low = super(DualCodec, self)._encode(rows, axis)
        return pack(codes >> 4, 4), pack(codes & 15, 4), step, low

    def _decode(self, codes: Codes, dtype: torch.dtype) -> Tensor:
        upper, lower, step, low = codes
        codes8 = (unpack(upper, 4) << 4) | unpack(lower, 4)
        return super(DualCodec, self)._decode((codes8, step, low), dtype)

    def upper(self, codes: Codes) -> tuple[Codec, Codes]:
        """A 4-bit codec and its codes: the upper plane, not copied, with scales adapted. It has half the bytes."""
        wide = [(codes[at], codes[at + 2] * 16, codes[at + 3] + codes[at + 2] * 8) for at in (0, 4)]
        return Codec(4), (*wide[0], *wide[1])


@dataclass(frozen=True, slots=True)
class GroupCodec(Codec):
    """2-bit codes in groups of 32: of keys 32 positions of a channel, of values 32 channels of a position; with their
    share of the scales 2.5 bits a value.

    A step has 5 bits of exponent and 3 of mantissa, a low is a number of quarter steps. The range is that of the least
    and the greatest value: a narrower one with the least squared error made attention's error larger (by 4 % behind
    4,000 tokens), as the outermost keys are those that are read most.
    """

    bits: int = 2

    def empty(self, shape: Shape, blocks: int) -> Codes:
        k, d = shape.key_heads, shape.head_dim
        sizes = [((BLOCK, d // 4), scales, scales) for scales in ((BLOCK // _GROUP, d), (BLOCK, d // gcd(d, _GROUP)))]
        dtypes = torch.uint8, torch.uint8, torch.int8
        return tuple(
            shape.empty((k, blocks, *size), dtype) for side in sizes for size, dtype in zip(side, dtypes, strict=True)
        )

    def encode(self, keys: Tensor, values: Tensor) -> Codes:
        wide = gcd(values.shape[-1], _GROUP)
        k, v = keys.float(), values.float()
        return (
            *_in_groups(k.reshape(*k.shape[:2], -1, _GROUP, k.shape[3]), -2, k.shape),
            *_in_groups(v.reshape(*v.shape[:3], -1, wide), -1, v.shape),
        )

    def decode(self, codes: Codes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        packed, step, low = codes[3:]
        values = unpack(packed, 2).to(dtype).view(*step.shape, -1)
        values = values.mul_(_steps(step)[..., None].to(dtype)).add_(_lows(step, low)[..., None].to(dtype))
        return self.keys(codes, dtype), values.flatten(-2).flatten(1, 2)

    def keys(self, codes: Codes, dtype: torch.dtype) -> Tensor:
        """Keys [K, b * 64, D] alone."""
        packed, step, low = codes[:3]
        heads, blocks, groups, dim = step.shape
        keys = unpack(packed, 2).to(dtype).view(heads, blocks, groups, _GROUP, dim)
        keys = keys.mul_(_steps(step)[..., None, :].to(dtype)).add_(_lows(step, low)[..., None, :].to(dtype))
        return keys.flatten(1, 3)


def _in_groups(rows: Tensor, axis: int, shape: torch.Size) -> Codes:
    """Codes, steps and lows of fp32 values whose groups lie along `axis`. shape: of the blocks, as codes are packed."""
    least, greatest = rows.amin(axis, keepdim=True), rows.amax(axis, keepdim=True)
    middle, half = (least + greatest) / 2, (greatest - least) / 2
    step = _as_byte(torch.maximum(half / 1.5, middle.abs() / _MOST_LOW))
    scale = _steps(step)
    low = torch.where(scale > 0, (middle / scale.clamp(min=2.0**-24) - 1.5) * 4, 0.0).round_().clamp_(-127, 127)
    codes = _nearest(rows - low * (scale * 0.25), scale, 0, 3).to(torch.uint8)
    return pack(codes.reshape(shape), 2), step.squeeze(axis), low.to(torch.int8).squeeze(axis)


def _as_byte(step: Tensor) -> Tensor:
    """The nearest byte to a step: the upper half of an fp16's bits, without the sign."""
    bits = step.clamp(max=_LARGEST).half().view(torch.int16).to(torch.int32)
    return ((bits + 64) >> 7).clamp_(0, 247).to(torch.uint8)  # from 248 on it is no number


def _steps(step: Tensor) -> Tensor:
    """What bytes of steps stand for, in fp32."""
    return (step.to(torch.int32) << 7).to(torch.int16).view(torch.float16).float()


def _lows(step: Tensor, low: Tensor) -> Tensor:
    return low.float() * (_steps(step) * 0.25)


def _nearest(rows: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The nearest code to each value, by the rounded fp16 scale; 0 where the scale is 0."""
    scale = step.float()
    return torch.where(scale > 0, rows / scale.clamp(min=2.0**-24), 0.0).round_().clamp_(low, high)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., D] below 2^bits into bytes [..., D * bits / 8].

    A byte holds codes that are D * bits / 8 channels apart, the first in its lowest bits: unpacking is then a shift and
    a mask for each contiguous piece of channels.
    """
    if bits == 8:
        return codes
    packed = torch.zeros_like(codes.chunk(8 // bits, -1)[0])
    for i, piece in enumerate(codes.chunk(8 // bits, -1)):
        packed |= piece << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)], -1)
