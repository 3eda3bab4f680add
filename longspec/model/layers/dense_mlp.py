"""The gated MLP: down(activation(gate(x)) * up(x)).

Takes normed rows [r, width], gives [r, width]; leaves nothing in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from longspec.model.layers.reader import Reader

__all__ = ["DenseMlp"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """Gate and up are one matrix."""

    gate_up: Any  # Linear or CodedLinear
    down: Any
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def read(cls, reader: Reader, layer: int) -> DenseMlp:
        return cls.of(reader, f"layers.{layer}.mlp", reader.config.mlp_width)

    @classmethod
    def of(cls, reader: Reader, at: str, channels: int) -> DenseMlp:
        """The MLP of that name and width: a layer's, or an expert's."""
        c = reader.config
        names = ["gate_up_proj"] if c.fused or reader.has(f"{at}.gate_up_proj.weight") else ["gate_proj", "up_proj"]
        return cls(
            gate_up=reader.linear([f"{at}.{name}" for name in names], 2 * channels, c.width),
            down=reader.linear([f"{at}.down_proj"], c.width, channels),
            activation=_ACTIVATIONS[c.activation],
        )

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.gate_up, self.down

    def touched(self, rows: int) -> int:
        """Bytes of weights that a pass of so many rows reads."""
        sizes: list[int] = [tensor.nbytes for matrix in self.weights for tensor in matrix.tensors]
        return sum(sizes)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        made: Tensor = self.down(self.activation(gate) * up)
        return made
