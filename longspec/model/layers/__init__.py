"""Sub-layers, one file each, and the two dicts that list them by the names that a config's layers say.

A mixer takes normed rows [r, width] and their pass, mixes them with earlier positions, and gives [r, width]; it says
what a position leaves in the cache (`rows`). An MLP takes and gives rows alone, and says which bytes a pass
reads (`touched`). Both read their own weights.
"""

from __future__ import annotations

from typing import Any

from longspec.model.layers.attention import Attention
from longspec.model.layers.dense_and_experts import DenseAndExperts
from longspec.model.layers.dense_mlp import DenseMlp
from longspec.model.layers.gated_delta import GatedDelta
from longspec.model.layers.grouped_linear import GroupedLinear
from longspec.model.layers.moe import Moe
from longspec.model.layers.shared_attention import SharedAttention
from longspec.model.layers.short_conv import ShortConv

__all__ = ["MIXERS", "MLPS"]

MIXERS: dict[str, Any] = {
    "attention": Attention,
    "gated_delta": GatedDelta,
    "grouped_linear": GroupedLinear,
    "shared_attention": SharedAttention,
    "short_conv": ShortConv,
}

MLPS: dict[str, Any] = {"dense": DenseMlp, "dense_and_experts": DenseAndExperts, "experts": Moe}
