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
        c, at = reader.config, f"layers.{layer}.mlp"
        names = ["gate_up_proj"] if c.fused else ["gate_proj", "up_proj"]
        return cls(
            gate_up=reader.linear([f"{at}.{name}" for name in names], 2 * c.mlp_width, c.width),
            down=reader.linear([f"{at}.down_proj"], c.width, c.mlp_width),
            activation=_ACTIVATIONS[c.activation],
        )

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.gate_up, self.down

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        made: Tensor = self.down(self.activation(gate) * up)
        return made
