"""Linear layers in torch: x [r, in] to y [r, out].

A row's result must not depend on the other rows. In fp32 `F.linear` keeps that up to the last bits; with `tile`, bit
for bit: rows are computed in tiles of one fixed size, the last one padded, since a kernel's order of summation
depends on the number of rows and on nothing else (checked for every shape of the default model; `--strict`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Linear"]


class Linear:
    """y = x W^T + b, for x [r, in]."""

    __slots__ = ("bias", "tile", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, tile: int | None = None) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]
        self.tile = tile

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, rows: Tensor) -> Tensor:
        if self.tile is None:
            if len(rows) == 1 and self.bias is None and rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
                # The matrix-vector kernel is faster: 11.7 ms for all layers of the default model, against 16.4 with a
                # matrix of one row (two cores with AMX), at the same error to fp64.
                return torch.mv(self.weight, rows[0])[None]
            return F.linear(rows, self.weight, self.bias)
        out = rows.new_empty(len(rows), self.weight.shape[0])
        for start in range(0, len(rows), self.tile):
            piece = rows[start : start + self.tile]
            padded = F.pad(piece, (0, 0, 0, self.tile - len(piece)))
            out[start : start + self.tile] = F.linear(padded, self.weight, self.bias)[: len(piece)]
        return out
