"""A decoder layer: a mixer and an MLP, with norms before or after each, or both; and what its cache must hold.

Takes a config and a reader of weights; gives layers, and the shape of a cache for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longspec.cache.shape import Shape, StateSpec
from longspec.model.config import Config
from longspec.model.layers import MIXERS, MLPS
from longspec.model.layers.layer_inputs import LayerEnd
from longspec.model.layers.norm import Norm
from longspec.model.layers.reader import Reader
from longspec.model.rows import Pass
from longspec.model.weights.quantized import CodedLinear

__all__ = ["Layer", "looped", "read_layer", "shape_of", "tensors_of", "through"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's sub-layers and norms."""

    before_mixer: Norm | None
    mixer: Any  # of MIXERS
    after_mixer: Norm | None
    before_mlp: Norm | None
    mlp: Any  # of MLPS
    after_mlp: Norm | None
    end: LayerEnd | None = None  # what stands behind both sub-layers

    @property
    def weights(self) -> Iterator[Any]:
        """Norms and matrices, in the order in which they are used."""
        yield self.before_mixer
        yield from self.mixer.weights
        yield from (self.after_mixer, self.before_mlp)
        yield from self.mlp.weights
        yield self.after_mlp
        yield from () if self.end is None else self.end.weights


def read_layer(reader: Reader, i: int) -> Layer:
    """Layer i of the decoder. ModelError where a tensor is missing or of another shape."""
    c, spec = reader.config, reader.config.specs[i]
    before, after = spec.norms in ("before", "both"), spec.norms in ("after", "both")
    # With four norms (Gemma), Llama's name for the second one is that of the norm after attention; OLMo 2 has only the
    # two after the sub-layers.
    second = "pre_feedforward_layernorm" if spec.norms == "both" else "post_attention_layernorm"
    at = f"layers.{i}"
    if c.per_layer is None:
        place = sum(each.is_attention == spec.is_attention for each in c.specs[:i])
    else:
        place = c.per_layer.owners.index(c.per_layer.sources[i])
    return Layer(
        before_mixer=reader.norm(f"{at}.input_layernorm", c.width) if before else None,
        mixer=MIXERS[spec.mixer].read(reader, i, place),
        after_mixer=reader.norm(f"{at}.post_attention_layernorm", c.width) if after else None,
        # An MLP beside experts norms its rows itself.
        before_mlp=reader.norm(f"{at}.{second}", c.width) if before and spec.mlp != "dense_and_experts" else None,
        mlp=MLPS[spec.mlp].read(reader, i),
        after_mlp=reader.norm(f"{at}.post_feedforward_layernorm", c.width) if after else None,
        end=LayerEnd.read(reader, i),
    )


def through(layer: Layer, hidden: Tensor, run: Pass, *, mixes: bool, mlp: bool) -> Tensor:
    """Hidden states [r, width] after a layer, or after one of its two sub-layers."""
    if mixes:
        x = layer.mixer(layer.before_mixer(hidden) if layer.before_mixer else hidden, run)
        hidden = hidden + (layer.after_mixer(x) if layer.after_mixer else x)
    if mlp:
        x = layer.mlp(layer.before_mlp(hidden) if layer.before_mlp else hidden)
        hidden = hidden + (layer.after_mlp(x) if layer.after_mlp else x)
    return hidden


def looped(layers: Sequence[Layer], loops: int) -> list[Layer]:
    """The layers as often as they run. A loop's have their own places in the cache, and share their weights."""
    return [
        replace(layer, mixer=replace(layer.mixer, place=layer.mixer.place + loop * len(layers)))
        for loop in range(loops)
        for layer in layers
    ]


def shape_of(config: Config, dtype: torch.dtype, device: torch.device) -> Shape:
    """What a cache must know of a decoder: the rows of its attention layers, and the states of the others."""
    if (each := config.per_layer) is not None:
        windows = tuple(config.windows[i] for i in each.owners)
        sizes = tuple(each.heads[i] for i in each.owners)
        return Shape(*sizes[0], windows, dtype, device, sizes=sizes if len(set(sizes)) > 1 else ())
    windows = tuple(window for window, spec in zip(config.windows, config.specs, strict=True) if spec.is_attention)
    others = [spec.mixer for spec in config.specs if not spec.is_attention]
    states: StateSpec | None = MIXERS[others[0]].states(config, dtype, len(others)) if others else None
    return Shape(config.key_heads, config.head_dim, windows, dtype, device, states)


def tensors_of(held: Any) -> Iterator[Tensor]:
    """The tensors of a table, a norm, a layer's matrix, or nothing."""
    if isinstance(held, CodedLinear):
        yield from held.tensors
    elif isinstance(held, Tensor):
        yield held
    else:
        yield from (tensor for name in ("weight", "bias") if (tensor := getattr(held, name, None)) is not None)
