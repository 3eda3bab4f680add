"""Blocks of formats: random ones, as the gguf package reads GGUF's and can't write them, and with zero points."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

_NUMBERS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
}  # fmt: skip
"""Where a block's fp16 numbers stand."""

ZERO_POINTS = {"INT4_32": 32, "INT4_128": 128}
"""Columns of a block: an fp32 step, a byte of zero point, codes in pairs (`kernels/blocks.h`)."""


def random_blocks(name: str, out: int, width: int, *, seed: int = 3, size: float = 1e-3) -> Tensor:
    """Rows of blocks [out, bytes] of every code, with groups up to a hundred times larger than others, about `size`."""
    zero = ZERO_POINTS.get(name)
    columns, nbytes = (zero, 5 + zero // 2) if zero else GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (out, width // columns, nbytes), dtype=np.uint8)
    for at in _NUMBERS.get(name, ()):
        values = size * 10 ** generator.uniform(-1, 1, blocks.shape[:2])
        blocks[..., at : at + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    if zero:
        steps = size * 10 ** generator.uniform(-1, 1, blocks.shape[:2])
        blocks[..., :4] = steps.astype(np.float32)[..., None].view(np.uint8)
        blocks[..., 4] %= 17
    if name == "MXFP4":
        blocks[..., 0] = 127 + generator.integers(-12, -4, blocks.shape[:2])
    return torch.from_numpy(blocks.reshape(out, -1))


def values(name: str, blocks: Tensor) -> Tensor:
    """What the gguf package reads in them, or step * (code - zero point)."""
    if columns := ZERO_POINTS.get(name):
        each = blocks.view(len(blocks), -1, 5 + columns // 2)
        codes = torch.stack((each[..., 5:] & 15, each[..., 5:] >> 4), -1).flatten(2).float()
        steps = each[..., :4].contiguous().view(torch.float32)
        return (steps * (codes - each[..., 4:5].float())).flatten(1)
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), GGMLQuantizationType[name]))


def quantized(array: Any, kind: GGMLQuantizationType) -> Any:
    """The matrix in blocks; random ones of about its size where the gguf package can't quantize to this kind."""
    try:
        return gguf.quantize(array, kind)
    except NotImplementedError:
        size = float(array.std()) / (1000 if kind.name in ("Q3_K", "Q6_K", "IQ4_XS") else 200)
        made = random_blocks(kind.name, array.size // array.shape[-1], array.shape[-1], size=size)
        return made.view(*array.shape[:-1], -1).numpy()
