"""A decoder layer's weights: norms and matrices, read by their checkpoint names.

Takes a config and weights; gives layers whose shapes are checked against the config. Computes nothing but norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.linear import Linear
from longspec.model.weights.quantized import CodedLinear
from longspec.model.weights.read import Weights

__all__ = ["Layer", "LayerReader", "Norm"]


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm of x [r, width]."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:  # Gemma multiplies before it rounds
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: attention and a gated MLP, with norms before or after each, or both."""

    before_attention: Norm | None
    qkv: Any  # Linear or CodedLinear, as are the other matrices
    query_norm: Norm | None
    key_norm: Norm | None
    output: Any
    after_attention: Norm | None
    before_mlp: Norm | None
    gate_up: Any
    down: Any
    after_mlp: Norm | None


class LayerReader:
    """Reads weights by their checkpoint names, checks each shape against the config, and moves them to the device."""

    def __init__(
        self, config: Config, weights: Weights, device: torch.device, tile: int | None, coded: str | None
    ) -> None:
        """tile: rows of `Linear`'s tiles. coded: the format of matrices that the file doesn't hold in codes of its
        own; None for dense ones.
        """
        self._config, self._weights, self._device, self._tile, self._coded = config, weights, device, tile, coded
        self.nbytes = 0
        prefixes = ("model.", "", "language_model.model.", "model.language_model.")
        found = [prefix for prefix in prefixes if f"{prefix}embed_tokens.weight" in weights]
        if not found:
            raise ModelError("The checkpoint holds no embed_tokens.weight: it is not one of a supported decoder.")
        self._prefix = found[0]

    def embedding(self) -> Tensor | CodedLinear:
        """The table [V, width]: in the file's codes where it has some and the matrices are coded, else dense."""
        name, shape = f"{self._prefix}embed_tokens.weight", (self._config.vocabulary, self._config.width)
        if self._coded is not None and self._weights.blocks(name) is not None:
            made: CodedLinear = self._matrix([name], shape)
            return made
        return self._take([name], shape)

    def norm(self, name: str, width: int) -> Norm:
        weight = self._take([f"{self._prefix}{name}.weight"], (width,))
        if self._config.norm_offset:
            weight = weight.float() + self._config.norm_offset
        return Norm(weight, self._config.eps)

    def head(self, embedding: Tensor | CodedLinear) -> Any:
        """The output matrix [V, width]: the file's, else the embedding table of a tied model.

        A tied model's file that also holds a different head counts as untied, as in transformers 5.24 and llama.cpp.
        """
        shape = (self._config.vocabulary, self._config.width)
        for name in ("lm_head.weight", "language_model.lm_head.weight"):
            if name in self._weights:
                return self._matrix([name], shape)
        if not self._config.tied:
            raise ModelError(
                "The checkpoint holds no lm_head.weight, and its config.json says that the head is not the embedding "
                "table (tie_word_embeddings): the files are incomplete. Fetch them again."
            )
        if isinstance(embedding, CodedLinear):
            return embedding
        if self._coded is not None:
            return self._matrix([f"{self._prefix}embed_tokens.weight"], shape)
        return Linear(embedding, tile=self._tile)

    def layer(self, i: int) -> Layer:
        c = self._config
        at = f"layers.{i}"
        q, kv = c.heads * c.head_dim, c.key_heads * c.head_dim
        before, after = c.norms in ("before", "both"), c.norms in ("after", "both")
        # With four norms (Gemma), Llama's name for the second one is that of the norm after attention; OLMo 2 has
        # only the two after the sub-layers.
        second = "pre_feedforward_layernorm" if c.norms == "both" else "post_attention_layernorm"
        queries, keys = {"head": (c.head_dim, c.head_dim), "width": (q, kv), None: (0, 0)}[c.query_norm]
        qkv = ["qkv_proj"] if c.fused else ["q_proj", "k_proj", "v_proj"]
        gate_up = ["gate_up_proj"] if c.fused else ["gate_proj", "up_proj"]
        return Layer(
            before_attention=self.norm(f"{at}.input_layernorm", c.width) if before else None,
            qkv=self._linear([f"{at}.self_attn.{name}" for name in qkv], q + 2 * kv, c.width),
            query_norm=self.norm(f"{at}.self_attn.q_norm", queries) if queries else None,
            key_norm=self.norm(f"{at}.self_attn.k_norm", keys) if keys else None,
            output=self._linear([f"{at}.self_attn.o_proj"], c.width, q),
            after_attention=self.norm(f"{at}.post_attention_layernorm", c.width) if after else None,
            before_mlp=self.norm(f"{at}.{second}", c.width) if before else None,
            gate_up=self._linear([f"{at}.mlp.{name}" for name in gate_up], 2 * c.mlp_width, c.width),
            down=self._linear([f"{at}.mlp.down_proj"], c.width, c.mlp_width),
            after_mlp=self.norm(f"{at}.post_feedforward_layernorm", c.width) if after else None,
        )

    def _linear(self, names: Sequence[str], rows: int, columns: int) -> Any:
        biases = [f"{self._prefix}{name}.bias" for name in names]
        bias = self._take(biases, (rows,)) if biases[0] in self._weights else None
        return self._matrix([f"{self._prefix}{name}.weight" for name in names], (rows, columns), bias)

    def _matrix(self, names: Sequence[str], shape: tuple[int, int], bias: Tensor | None = None) -> Any:
        if self._coded is None:
            return Linear(self._take(names, shape), bias, self._tile)
        made = self._weights.coded(names, self._coded, bias)
        self._check(names, made.shape, shape)
        self.nbytes += sum(piece.tiles.nbytes for piece in made.pieces)
        return made

    def _take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        tensor = self._weights.joined(names)
        self._check(names, tuple(tensor.shape), shape)
        self.nbytes += tensor.nbytes
        return tensor.to(self._device)

    def _check(self, names: Sequence[str], seen: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if seen != wanted:
            raise ModelError(f"{', '.join(names)}: the checkpoint has {list(seen)}, its config.json {list(wanted)}.")
