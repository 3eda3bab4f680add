"""Blocks of keys and values as small integers, and back.

Takes whole blocks of 64 rows, gives codes and fp16 scales; knows no text, stage or model. Keys are scaled per channel
over a block's rows, since a few of their channels are always large; values per row over its channels (KIVI,
2402.02750). A block is encoded once, from its rows in the cache's dtype, and never again.

    asymmetric   value = low + step * code           code in 0 .. 2^bits - 1
    symmetric    value = step * code                 code in -127 .. 127, 8 bits: two bytes a scale less

Letters: K key heads, b blocks, D head dimension, s = D * bits / 8 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspec.cache.stage import BLOCK, Shape

__all__ = ["Codec", "Codes", "DualCodec", "pack", "unpack"]

Codes = tuple[Tensor, ...]
"""A codec's tensors for b blocks, each [K, b, ...]: key codes and scales, then value codes and scales."""

_LARGEST = 65504.0  # in fp16


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to code blocks."""

    bits: int  # 2, 4 or 8
    symmetric: bool = False  # 8 bits only

    def empty(self, shape: Shape, blocks: int) -> Codes:
        """Room for blocks of one layer."""
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
        """Keys and values [K, b, 64, D] as codes."""
        return (*self._encode(keys, -2), *self._encode(values, -1))

    def decode(self, codes: Codes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [K, b * 64, D] in `dtype`."""
        half = len(codes) // 2
        keys, values = self._decode(codes[:half], dtype), self._decode(codes[half:], dtype)
        return keys.flatten(1, 2), values.flatten(1, 2)

    def upper(self, codes: Codes) -> tuple[Codec, Codes]:
        """A coarser codec and its codes of the same blocks, for guessing: these codes have no coarser part."""
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

    The target reads both. The upper plane alone, `upper`, is a drafter's view: each code in the middle of the 16 that
    share its upper bits.
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
        """The upper plane as a codec and its codes, without a copy of the plane: half the bytes to read."""
        wide = [(codes[at], codes[at + 2] * 16, codes[at + 3] + codes[at + 2] * 8) for at in (0, 4)]
        return Codec(4), (*wide[0], *wide[1])


def _nearest(rows: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The code that the stored scale brings closest to each value; 0 where the scale is 0."""
    scale = step.float()
    return torch.where(scale > 0, rows / scale.clamp(min=2.0**-24), 0.0).round_().clamp_(low, high)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] below 2^bits into bytes [..., D * bits / 8].

    A byte holds codes that stand D * bits / 8 apart, the first in its lowest bits: unpacking is then a few shifts whose
    results lie behind each other.
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
