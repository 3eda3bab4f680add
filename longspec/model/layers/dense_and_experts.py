"""An MLP for all rows and a mixture of experts beside it (Gemma 4's mixture), each with norms of its own.

Takes the rows of the residual stream [r, width], not normed, since the router norms them otherwise than the MLPs do;
gives [r, width]; leaves nothing in a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from longspec.model.layers.dense_mlp import DenseMlp
from longspec.model.layers.moe import Moe
from longspec.model.layers.moe_native import KernelExperts
from longspec.model.layers.norm import Norm
from longspec.model.layers.reader import Reader
from longspec.model.linear import Linear
from longspec.model.native import missing
from longspec.model.routing import Recent

__all__ = ["DenseAndExperts"]


@dataclass(frozen=True, slots=True)
class DenseAndExperts:
    """One layer's."""

    before: Norm
    dense: DenseMlp
    multiply: Callable[[Tensor, Sequence[int]], Tensor]  # the dense one's rows, by C where it can
    after: Norm
    before_experts: Norm
    experts: Moe  # whose router takes rows of norm 1
    after_experts: Norm

    @classmethod
    def read(cls, reader: Reader, layer: int) -> DenseAndExperts:
        c, at = reader.config, f"layers.{layer}"
        assert c.per_layer is not None
        dense, experts = DenseMlp.of(reader, f"{at}.mlp", c.per_layer.channels[layer]), Moe.read(reader, layer)
        # Rows are normed without a weight, times this one over the root of the width: that is the router's own.
        columns = reader.exact(f"{at}.router.scale", (c.width,)) * c.width**-0.5
        factors = reader.exact(f"{at}.router.per_expert_scale", (experts.mixture.experts,))
        router = Linear(experts.router.weight * columns, tile=experts.router.tile)
        by_kernel = missing(c, reader.dtype, reader.device) is None
        return cls(
            before=reader.norm(f"{at}.pre_feedforward_layernorm", c.width),
            dense=dense,
            multiply=KernelExperts([dense], c) if by_kernel else lambda rows, counts: dense(rows),
            after=reader.norm(f"{at}.post_feedforward_layernorm_1", c.width),
            before_experts=reader.norm(f"{at}.pre_feedforward_layernorm_2", c.width),
            experts=replace(experts, router=router, factors=factors),
            after_experts=reader.norm(f"{at}.post_feedforward_layernorm_2", c.width),
        )

    @property
    def norms(self) -> tuple[Norm, ...]:
        return self.before, self.after, self.before_experts, self.after_experts

    @property
    def weights(self) -> tuple[Any, ...]:
        return *self.norms, *self.dense.weights, *self.experts.weights

    @property
    def recent(self) -> Recent | None:
        return self.experts.recent

    def touched(self, rows: int) -> float:
        """Bytes of weights that a pass of so many rows is expected to read."""
        norms = sum(norm.weight.nbytes for norm in self.norms)
        return norms + self.dense.touched(rows) + self.experts.touched(rows)

    def __call__(self, x: Tensor) -> Tensor:
        made = self.after(self.multiply(self.before(x), [len(x)]))
        unit = F.rms_norm(x.float(), (x.shape[1],), None, self.before.eps)
        return made + self.after_experts(self.experts(self.before_experts(x), by=unit))
