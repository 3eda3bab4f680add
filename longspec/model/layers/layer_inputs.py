"""Per-layer embeddings (Gemma 3n and 4): each layer takes an embedding of the token that is its own.

    c_l = (n(P e)_l / sqrt(d) + sqrt(p) E_l[token]) / sqrt(2)      e: the token's embedding, scaled; d its width
    h  <- s (h + n'(W act(G h) * c_l))                             behind both sub-layers of layer l

Takes tokens and their embeddings, gives c [r, layers, p]; and of a layer's output and its c the layer's output. What a
row takes depends on its own token alone, so that a pass that resumes at a later layer makes it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from longspec.model.layers.norm import Norm
from longspec.model.layers.reader import Reader
from longspec.model.layers.steady import steady
from longspec.model.weights.quantized import CodedLinear

__all__ = ["LayerEnd", "LayerInputs"]

_GELU = partial(F.gelu, approximate="tanh")


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a model holds for all layers."""

    layers: int
    table: Tensor | CodedLinear  # [V, layers * p]
    projection: Any  # from the width to layers * p
    norm: Norm
    scale: float  # of the projection

    @classmethod
    def read(cls, reader: Reader) -> LayerInputs | None:
        """None of a model without."""
        c, each = reader.config, reader.config.per_layer
        if each is None or not each.inputs:
            return None
        size = c.layers * each.inputs
        return cls(
            c.layers,
            reader.table("embed_tokens_per_layer", (each.table, size)),
            reader.product("per_layer_model_projection", size, c.width),
            reader.norm("per_layer_projection_norm", each.inputs),
            c.width**-0.5,
        )

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.table, self.projection, self.norm

    def __call__(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """[r, layers, p] of tokens [r] and their scaled embeddings [r, width]."""
        table = self.table
        own = F.embedding(tokens, table) if isinstance(table, Tensor) else table.rows(tokens, embeddings.dtype)
        own = own.view(len(tokens), self.layers, -1)
        own = own * own.shape[-1] ** 0.5
        said = (self.projection(embeddings) * self.scale).view(own.shape)
        made: Tensor = (self.norm(said) + own) * 2.0**-0.5
        return made


@dataclass(frozen=True, slots=True)
class LayerEnd:
    """What stands behind a layer's sub-layers: its own embedding, if it takes one, and a factor on all."""

    layer: int
    gate: Any  # from the width to p; None without embeddings
    projection: Any
    norm: Norm | None
    factor: Tensor  # [1]
    steady: bool  # the activation's bits don't depend on where a value stands

    @classmethod
    def read(cls, reader: Reader, layer: int) -> LayerEnd | None:
        """None for families that have nothing there."""
        c, each, at = reader.config, reader.config.per_layer, f"layers.{layer}"
        if each is None:
            return None
        factor = reader.exact(f"{at}.layer_scalar", (1,))
        if not each.inputs:
            return cls(layer, None, None, None, factor, steady=True)
        return cls(
            layer,
            reader.product(f"{at}.per_layer_input_gate", each.inputs, c.width),
            reader.product(f"{at}.per_layer_projection", c.width, each.inputs),
            reader.norm(f"{at}.post_per_layer_input_norm", c.width),
            factor,
            steady=reader.strict or reader.by_kernel,
        )

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.gate, self.projection, self.norm, self.factor

    def __call__(self, hidden: Tensor, inputs: Tensor | None) -> Tensor:
        """The layer's output [r, width]; inputs: [r, layers, p]."""
        if self.gate is not None and inputs is not None and self.norm is not None:
            open_ = steady(_GELU, self.gate(hidden), strict=self.steady).to(hidden.dtype)
            gated = open_ * inputs[:, self.layer]
            hidden = hidden + self.norm(self.projection(gated))
        return hidden * self.factor.to(hidden.dtype)
