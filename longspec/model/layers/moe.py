"""A mixture of experts: each row goes through the few MLPs that a router chooses for it, and sums up what they give.

Takes normed rows [r, width], gives [r, width]; leaves nothing in a cache. Rows are sorted by expert, so that a pass
reads an expert's weights once. A shared expert is one more that every row chooses, with a gate for its weight.

A row's experts don't depend on the rows beside it: the router multiplies in fp32, in tiles of one size, and takes
exponentials in fp64. What a row's experts give is summed in the order of its own choice. With the C kernels and under
--strict all of its bits are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspec.model.layers.dense_mlp import DenseMlp
from longspec.model.layers.moe_native import KernelExperts
from longspec.model.layers.reader import Reader
from longspec.model.layers.steady import steady
from longspec.model.linear import Linear
from longspec.model.mixtures import Mixture
from longspec.model.native import missing
from longspec.model.routing import Recent
from longspec.model.weights.pool import Pooled

__all__ = ["Moe"]

_TILE = 16
"""Rows of the router's products: with as many, one row takes no longer than reading the router."""


@dataclass(frozen=True, slots=True)
class Moe:
    """One layer's experts. The shared one, if any, is the last, and its gate the router's last row."""

    mixture: Mixture
    router: Linear  # [experts, width] in fp32
    bias: Tensor | None  # [experts]
    experts: tuple[DenseMlp, ...]
    multiply: Callable[[Tensor, Sequence[int]], Tensor]  # rows [p, width] sorted by expert, and how many each has
    factors: Tensor | None = None  # [experts] in fp32: of each expert's weight
    recent: Recent | None = None  # what the last rows chose

    @classmethod
    def read(cls, reader: Reader, layer: int) -> Moe:
        c, at = reader.config, f"layers.{layer}.mlp"
        mixture = c.mixture
        assert mixture is not None
        if reader.has(f"{at}.experts.{mixture.experts}.down_proj.weight"):
            raise reader.beyond(f"{at}.experts.{mixture.experts}.down_proj.weight", f"{mixture.experts} experts")
        router = [reader.exact(f"{at}.gate.weight", (mixture.experts, c.width))]
        experts = [DenseMlp.of(reader, f"{at}.experts.{i}", mixture.width) for i in range(mixture.experts)]
        if mixture.shared:
            router.append(reader.exact(f"{at}.shared_expert_gate.weight", (1, c.width)))
            experts.append(DenseMlp.of(reader, f"{at}.shared_expert", mixture.shared))
        offset = reader.exact(f"{at}.gate.bias", (mixture.experts,)) if mixture.logit_bias else None
        native = missing(c, reader.dtype, reader.device) is None
        made = cls(
            mixture,
            Linear(torch.cat(router), offset, tile=_TILE),
            bias=reader.exact(f"{at}.expert_bias", (mixture.experts,)) if mixture.biased else None,
            experts=tuple(experts),
            multiply=reader.pooled(KernelExperts(experts, c) if native else _by_torch(experts), layer),
            recent=Recent(mixture.experts) if reader.device.type == "cpu" else None,  # to ask a GPU is to wait for it
        )
        if isinstance(made.multiply, Pooled):
            made.multiply.routed_by(made.route)
        return made

    @classmethod
    def workspace(cls, mixture: Mixture, width: int, rows: int) -> int:
        """Bytes of a pass's temporary tensors."""
        return rows * 4 * ((mixture.chosen + 1) * (3 * width + 2 * max(mixture.width, mixture.shared)) + 2 * width)

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.router, self.bias, self.factors, *(each for expert in self.experts for each in expert.weights)

    def touched(self, rows: int) -> float:
        """Bytes of weights that a pass of so many rows is expected to read."""
        routed, mixture = self.experts[: self.mixture.experts], self.mixture
        shared = sum(expert.touched(rows) for expert in self.experts[mixture.experts :])
        share = mixture.union(rows) / mixture.experts
        return (
            sum(each.nbytes for each in self.router.tensors)
            + shared
            + share * sum(expert.touched(rows) for expert in routed)
        )

    def __call__(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        """by: what the router takes in place of the rows."""
        chosen, weights = self.route(x if by is None else by)
        if self.recent is not None:
            self.recent.add(chosen[:, : self.mixture.chosen])
        if isinstance(self.multiply, Pooled):
            self.multiply.routed(x if by is None else by)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        made = x.new_empty(len(order), x.shape[1])
        made[order] = self.multiply(x[order // chosen.shape[1]], counts)
        total = x.new_zeros(x.shape, dtype=torch.float32)
        for i, each in enumerate(made.view(len(x), -1, x.shape[1]).unbind(1)):
            total += each.float() * weights[:, i, None]
        return total.to(x.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's experts, the best one first and the shared one last, and their weights in fp32: [r, chosen]."""
        m = self.mixture
        logits = self.router(x.float())
        logits, gate = logits.tensor_split((m.experts,), -1)
        if m.score == "softmax":
            scores = torch.softmax(logits.double(), -1).float()
        else:
            scores = steady(torch.sigmoid, logits, strict=True)
        chosen = (scores if self.bias is None else scores + self.bias).topk(m.chosen, -1).indices
        weights = scores.gather(-1, chosen)
        if m.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-6 if m.score == "sigmoid" else 0.0))
        weights = weights * (m.scale if self.factors is None else self.factors[chosen])
        if not m.shared:
            return chosen, weights
        last = torch.full_like(chosen[:, :1], m.experts)
        return torch.cat((chosen, last), -1), torch.cat((weights, steady(torch.sigmoid, gate, strict=True)), -1)


def _by_torch(experts: Sequence[DenseMlp]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """One expert after the other."""

    def multiply(rows: Tensor, counts: Sequence[int]) -> Tensor:
        made, at = torch.empty_like(rows), 0
        for expert, count in zip(experts, counts, strict=True):
            if count:
                made[at : at + count] = expert(rows[at : at + count])
            at += count
        return made

    return multiply
