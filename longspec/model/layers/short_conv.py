"""The gated short convolution (LFM2): of three products b, c, x of a row, c times the convolution of b times x.

Takes normed rows [r, width] and their pass; gives [r, width]. A position leaves the convolution's input; a block reads
the last inputs before it. Where the products are the C kernels', so is what is between (`native`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspec.cache.shape import RowSpec, StateSpec
from longspec.model.config import Config
from longspec.model.layers.conv_native import KernelConvolution, missing
from longspec.model.layers.gated_delta import convolved
from longspec.model.layers.reader import Reader
from longspec.model.rows import Pass

__all__ = ["ShortConv"]


@dataclass(frozen=True, slots=True)
class ShortConv:
    """One layer's short convolution."""

    place: int  # among the layers with a state
    inputs: Any  # Linear or CodedLinear
    convolution: Tensor  # [width, width of the convolution]
    bias: Tensor | None
    output: Any
    native: KernelConvolution | None

    @classmethod
    def rows(cls, config: Config, dtype: torch.dtype) -> tuple[RowSpec, ...]:
        """What a position leaves in the cache."""
        return (RowSpec("x", 1, config.width, dtype),)

    @classmethod
    def states(cls, config: Config, dtype: torch.dtype, layers: int) -> StateSpec:
        """What `layers` such layers keep."""
        return StateSpec(layers, cls.rows(config, dtype), config.convolution - 1)

    @classmethod
    def read(cls, reader: Reader, layer: int, place: int) -> ShortConv:
        c, at = reader.config, f"layers.{layer}.conv"
        inputs = reader.linear([f"{at}.in_proj"], 3 * c.width, c.width)
        convolution = reader.exact(f"{at}.conv.weight", (c.width, 1, c.convolution))[:, 0]
        bias = reader.exact(f"{at}.conv.bias", (c.width,)) if reader.has(f"{at}.conv.bias") else None
        by_kernel = reader.by_kernel and missing(c.convolution, c.width) is None
        return cls(
            place,
            inputs,
            convolution,
            bias,
            output=reader.linear([f"{at}.out_proj"], c.width, c.width),
            native=KernelConvolution(convolution.T, bias) if by_kernel else None,
        )

    @classmethod
    def workspace(cls, config: Config, rows: int) -> int:
        """Bytes of a pass's temporary tensors."""
        return rows * 4 * 7 * config.width

    @property
    def is_exact(self) -> bool:
        """Whether the C kernels take all of it in bf16, so that a row's bits are its own."""
        return self.native is not None

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.inputs, self.convolution, self.bias, self.output

    def __call__(self, x: Tensor, run: Pass) -> Tensor:
        left: Tensor = self.output(self.mix(self.inputs(x), run))
        return left

    def mix(self, made: Tensor, run: Pass) -> Tensor:
        """What is between the two products [r, width], of the inputs `made`."""
        before, after, x = made.chunk(3, -1)
        x = before * x
        output = torch.empty_like(x)
        for span in run.rows.spans:
            states, part = span.stage.states, output[span.at]
            history = states.history(self.place, span.staged, x=x[span.at][:, None])
            if self.native is not None:
                self.native.times(history, after[span.at], part)
            else:
                mixed = convolved(history, self.convolution)
                part.copy_(after[span.at] * (mixed if self.bias is None else mixed + self.bias).to(x.dtype))
            states.put(history)
        return output
