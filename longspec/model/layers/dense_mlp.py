"""The gated MLP: down(activation(gate(x)) * up(x)).

Takes normed rows [r, width], gives [r, width]; leaves nothing in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.model.layers.reader import Reader

__all__ = ["DenseMlp"]


def _clamped(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's: both are clamped at 7, and up is one more."""
    gate = gate.clamp(max=7.0)
    return (up.clamp(-7.0, 7.0) + 1) * (gate * torch.sigmoid(gate * 1.702))


_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "clamped": _clamped,
}
"""By the config's activation: what a product with gate and up becomes."""


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """Gate and up are one matrix."""

    gate_up: Any  # Linear or CodedLinear
    down: Any
    gated: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def read(cls, reader: Reader, layer: int) -> DenseMlp:
        return cls.of(reader, f"layers.{layer}.mlp", reader.config.channels(layer, active=True))

    @classmethod
    def of(cls, reader: Reader, at: str, channels: int) -> DenseMlp:
        """The MLP of that name and width: a layer's, or an expert's."""
        c = reader.config
        names = ["gate_up_proj"] if c.fused or reader.has(f"{at}.gate_up_proj.weight") else ["gate_proj", "up_proj"]
        return cls(
            gate_up=reader.linear([f"{at}.{name}" for name in names], 2 * channels, c.width),
            down=reader.linear([f"{at}.down_proj"], c.width, channels),
            gated=_GATED[c.activation],
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
        made: Tensor = self.down(self.gated(gate, up))
        return made
