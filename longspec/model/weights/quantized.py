"""Quantized weights: 4 or 8 bits in groups of 32 columns, each group with a scale; activations are quantized
likewise.

Takes weights of any dtype, or a GGUF file's codes; gives linear layers for the kernel of `layer.c`, which reads a
half or three tenths of bf16's bytes. A GGUF file's codes are used unchanged, so that nothing is quantized twice.
Activations are quantized to 8 bits, each 32 columns by their absolute maximum, as in llama.cpp. Outliers (a hundred
times the others in some channels: LLM.int8(), 2208.07339) then cost only their own group accuracy; nothing is
calibrated. Perplexity of the default model on three texts of 3,000 tokens, relative to bf16: +0.2%, +0.2%, -0.2%.
(With one scale per output channel and one per row it was +4.6%, with smoothed channels +0.7%.)

Sums over a group are exact integers and groups are summed in a fixed order: a row's bits don't depend on the other
rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BLOCKS", "GROUP", "STRIP", "Codes", "Groups", "joined", "of_blocks", "of_values"]

GROUP = 32
STRIP = 16
"""Outputs whose codes the kernel reads together."""


BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Kinds of GGUF tensors that stand in groups of 32: bytes of a group."""


class Codes:
    """A matrix [out, in] as step * code + low."""

    def __init__(self, bits: int, codes: Tensor, step: Tensor, low: Tensor | None = None) -> None:
        """Codes [out, in] uint8, below 2^bits; step and low [out, in / 32] fp16. Without low, 2^(bits - 1) is
        subtracted from codes.
        """
        self.bits, self.codes, self.step, self.low = bits, codes, step, low

    def values(self) -> Tensor:
        """The dequantized matrix [out, in] in fp32."""
        wide = _grouped(self.codes).float()
        if self.low is None:
            return ((wide - (1 << (self.bits - 1))) * self.step.float()[..., None]).flatten(1)
        return (wide * self.step.float()[..., None] + self.low.float()[..., None]).flatten(1)


def of_values(weight: Tensor) -> Codes:
    """Quantize weight [out, in] to 8 bits, symmetric: the error is at most 1/254 of a group's absolute maximum."""
    groups = _grouped(weight.float())
    step = (groups.abs().amax(2) / 127).clamp(min=2**-24).half()
    codes = (groups / step.float()[..., None]).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    return Codes(8, codes.flatten(1), step)


def of_blocks(kind: str, rows: Tensor) -> Codes | None:
    """The codes of a GGUF tensor's rows [out, bytes] of blocks, uint8; None for a kind whose groups aren't of 32.

    Layouts as in the format's reference: Q8_0 is a scale and 32 signed bytes, Q4_0 a scale and 16 bytes (lower
    nibbles are the first 16 columns), Q4_1 the same with a low after the scale.
    """
    if kind not in BLOCKS:
        return None
    blocks = rows.view(len(rows), -1, BLOCKS[kind])
    step = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    if kind == "Q8_0":
        return Codes(8, (blocks[..., 2:] ^ 128).flatten(1), step)  # signed bytes plus 128
    low = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0] if kind == "Q4_1" else None
    packed = blocks[..., -16:]
    return Codes(4, torch.cat((packed & 15, packed >> 4), -1).flatten(1), step, low)


def joined(matrices: Sequence[Codes]) -> Codes:
    """Concatenate matrices of one width along dimension 0; if their kinds differ, all are requantized to 8 bits."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if any(each.bits != first.bits or (each.low is None) != (first.low is None) for each in matrices):
        return of_values(torch.cat([each.values() for each in matrices]))
    lows = [each.low for each in matrices if each.low is not None]
    codes, step = (torch.cat([getattr(each, name) for each in matrices]) for name in ("codes", "step"))
    return Codes(first.bits, codes, step, torch.cat(lows) if lows else None)


class Groups:
    """y = x W^T + b with quantized W, for x [r, in]: the torch implementation, and the tensors of the C kernel."""

    def __init__(self, weight: Tensor, scale: Tensor, low: Tensor | None = None, bias: Tensor | None = None) -> None:
        """weight: [strips, groups, 8 words, 16 outputs, 4 columns] uint8; with 4 bits 4 words, of which the lower
        nibbles are words 0 to 3 and the upper ones 4 to 7. scale and low: [strips, groups, 16] fp16. in and out are
        multiples of 32.
        """
        self.weight, self.scale, self.low, self.bias = weight, scale, low, bias
        self.bits = weight.shape[2]  # the number of words
        self.size, self.width = len(weight) * STRIP, weight.shape[1] * GROUP

    @staticmethod
    def fit(weight: Tensor, *scales: Tensor) -> bool:
        """Whether the tensors have the shapes and dtypes of a layer: the kernel doesn't check them."""
        if weight.dim() != 5 or weight.shape[2] not in (4, 8) or weight.shape[3:] != (STRIP, 4):
            return False
        return all(each.shape == (*weight.shape[:2], 2 * STRIP) for each in scales)

    @classmethod
    def of(cls, codes: Codes, bias: Tensor | None = None) -> Groups:
        low = None if codes.low is None else _in_strips(codes.low)
        return cls(_packed(codes.codes, codes.bits), _in_strips(codes.step), low, bias)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.width

    @property
    def tensors(self) -> list[Tensor]:
        return [each for each in (self.weight, self.scale, self.low, self.bias) if each is not None]

    def codes(self) -> Codes:
        """Unpack to `Codes`: the inverse of packing."""
        low = None if self.low is None else _from_strips(self.low)
        return Codes(self.bits, _unpacked(self.weight, self.bits), _from_strips(self.scale), low)

    def __call__(self, rows: Tensor) -> Tensor:
        groups = _grouped(rows.float())
        largest = groups.abs().amax(2, keepdim=True)
        # `127 / largest` would be a reciprocal times 127, which rounds twice.
        factor = torch.where(largest > 0, torch.full_like(largest, 127).div(largest), 0.0)
        coded = ((groups * factor).round() * (largest / 127)).flatten(1)
        made = coded.double() @ self.codes().values().double().T
        made = made if self.bias is None else made + self.bias.double()
        return made.to(rows.dtype)


def _grouped(matrix: Tensor) -> Tensor:
    """[rows, width] to [rows, groups, 32]."""
    return matrix.view(len(matrix), -1, GROUP)


def _packed(codes: Tensor, bits: int) -> Tensor:
    words = codes.view(len(codes) // STRIP, STRIP, -1, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    return (words[:, :, :4] | words[:, :, 4:] << 4 if bits == 4 else words).contiguous()


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    words = torch.cat((packed & 15, packed >> 4), 2) if bits == 4 else packed
    return words.permute(0, 3, 1, 2, 4).reshape(len(packed) * STRIP, -1)


def _in_strips(scales: Tensor) -> Tensor:
    """[out, groups] to [strips, groups, 16]."""
    return scales.view(len(scales) // STRIP, STRIP, -1).transpose(1, 2).contiguous()


def _from_strips(scales: Tensor) -> Tensor:
    return scales.transpose(1, 2).reshape(len(scales) * STRIP, -1)
