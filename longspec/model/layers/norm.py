"""Root mean square norms. Takes rows and a weight; knows no layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Norm"]


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm of x [r, width]."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:  # Gemma multiplies before it rounds
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
