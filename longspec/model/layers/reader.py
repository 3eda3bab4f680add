"""A decoder's weights: norms and matrices, read by their checkpoint names.

Takes a config and weights; gives matrices and norms whose shapes are checked against the config. Knows no layer: each
sub-layer reads its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.layers.norm import Norm
from longspec.model.linear import Linear
from longspec.model.native import missing
from longspec.model.native_linear import KernelLinear
from longspec.model.weights.pool import Pooled
from longspec.model.weights.quantized import CodedLinear
from longspec.model.weights.read import Weights

__all__ = ["Reader"]

_NAMES = {
    "lfm2": {
        "input_layernorm": "operator_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        "self_attn.o_proj": "self_attn.out_proj",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "norm": "embedding_norm",
    },
    "mixtral": {
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
        "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
        "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
    },
}
_NAMES["ouro"] = {
    "post_attention_layernorm": "input_layernorm_2",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_attention_layernorm_2",
}
_NAMES["gpt_oss"] = {"mlp.gate": "mlp.router"}
_NAMES["gemma4_text"] = {"mlp.gate": "router.proj"} | {
    f"mlp.experts.*.{matrix}_proj": f"experts.*.{matrix}_proj" for matrix in ("gate_up", "gate", "up", "down")
}
_NAMES["lfm2_moe"] = _NAMES["lfm2"] | {
    "mlp": "feed_forward",
    "mlp.gate": "feed_forward.gate",
    "mlp.experts.*.gate_proj": "feed_forward.experts.*.w1",
    "mlp.experts.*.up_proj": "feed_forward.experts.*.w3",
    "mlp.experts.*.down_proj": "feed_forward.experts.*.w2",
}
"""By family: what its checkpoints call a module otherwise than Llama's and Qwen's; `*` is an expert's number."""

_MODULE = re.compile(r"(layers\.\d+\.)?(.+)\.(\w+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+")


class Reader:
    """Reads weights by their checkpoint names, checks each shape against the config, and moves them to the device."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        device: torch.device,
        tile: int | None,
        coded: str | None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        """tile: rows of `Linear`'s tiles. coded: the format of matrices that the file doesn't hold in codes of its
        own; None for dense ones. places: of a draft head that lies beside a decoder, what its layer (`layers.0.`) and
        its other modules are called there; such a head has no table.
        """
        self.config, self._weights, self.device, self._tile, self._coded = config, weights, device, tile, coded
        self.nbytes = 0
        self._places, self._names = places, _NAMES.get(config.family, {})
        if places is not None:
            return
        prefixes = ("model.", "", "language_model.model.", "model.language_model.")
        found = [prefix for prefix in prefixes if f"{prefix}embed_tokens.weight" in weights]
        if not found:
            raise ModelError("The checkpoint holds no embed_tokens.weight: it is not one of a supported decoder.")
        self._prefix = found[0]

    @property
    def strict(self) -> bool:
        return self._tile is not None

    @property
    def by_kernel(self) -> bool:
        """Whether the C kernels compute such a decoder: what is left to torch must then keep a row's bits its own."""
        return missing(self.config, self.dtype, self.device) is None

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    def embedding(self) -> Tensor | CodedLinear:
        """The table [V, width]: in the file's codes where it has some and the matrices are coded, else dense."""
        return self.table("embed_tokens", (self.config.vocabulary, self.config.width))

    def table(self, module: str, shape: tuple[int, int]) -> Tensor | CodedLinear:
        """A table that rows are looked up in, as the embedding is held."""
        name = f"{self._prefix}{module}.weight"
        if self._coded is not None and self._weights.blocks(name) is not None:
            made: CodedLinear = self._matrix([name], shape)
            return made
        return self._take([name], shape)

    def norm(self, name: str, width: int) -> Norm:
        weight = self._take([self._stored(f"{name}.weight")], (width,))
        if self.config.norm_offset:
            weight = weight.float() + self.config.norm_offset
        return Norm(weight, self.config.eps)

    def head(self, embedding: Tensor | CodedLinear) -> Any:
        """The output matrix [V, width]: the file's, else the embedding table of a tied model.

        A tied model's file that also holds a different head counts as untied, as in transformers 5.24 and llama.cpp.
        """
        shape = (self.config.vocabulary, self.config.width)
        for name in ("lm_head.weight", "language_model.lm_head.weight"):
            if name in self._weights:
                return self._matrix([name], shape)
        if not self.config.tied:
            raise ModelError(
                "The checkpoint holds no lm_head.weight, and its config.json says that the head is not the embedding "
                "table (tie_word_embeddings): the files are incomplete. Fetch them again."
            )
        if isinstance(embedding, CodedLinear):
            return embedding
        if self._coded is not None:
            return self._matrix([f"{self._prefix}embed_tokens.weight"], shape)
        return Linear(embedding, tile=self._tile)

    def linear(self, names: Sequence[str], rows: int, columns: int) -> Any:
        """The matrices [rows, columns], one below the other, with their biases where the file holds some."""
        biases = [self._stored(f"{name}.bias") for name in names]
        bias = self._take(biases, (rows,)) if biases[0] in self._weights else None
        return self._matrix([self._stored(f"{name}.weight") for name in names], (rows, columns), bias)

    def product(self, name: str, rows: int, columns: int) -> Any:
        """A matrix [rows, columns] that is multiplied by itself, not as a part of a layer's C call."""
        made = self.linear([name], rows, columns)
        return KernelLinear(made) if self.by_kernel else made

    def pooled(self, multiply: Callable[[Tensor, Sequence[int]], Tensor], layer: int) -> Any:
        """The products of a layer's experts; where these are on disk, with those that rows choose read before."""
        pool = self._weights.pool
        return multiply if pool is None else Pooled(multiply, pool, layer)

    def exact(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A small tensor's values in fp32, as the file has them: what a state decays by mustn't be rounded."""
        stored = self._stored(name)
        tensor = self._weights.exact(stored)
        self._check([stored], tuple(tensor.shape), shape)
        self.nbytes += tensor.nbytes
        return tensor.to(self.device)

    def numbers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def has(self, name: str) -> bool:
        return self._stored(name) in self._weights

    def beyond(self, name: str, said: str) -> ModelError:
        """The error for a tensor that the config leaves no place for."""
        return ModelError(f"The checkpoint holds {self._stored(name)}, and its config.json says {said}.")

    def _stored(self, name: str) -> str:
        """The tensor's name in the file, of its name in a Llama checkpoint."""
        found = _MODULE.fullmatch(name)
        assert found is not None, name
        layer, module, kind = found.groups(default="")
        if self._places is not None and not layer:
            return f"{self._places[module]}.{kind}"
        before = f"{self._prefix}{layer}" if self._places is None else self._places[layer]
        expert, general = "".join(_EXPERT.findall(module)), _EXPERT.sub("*", module)
        return f"{before}{self._names.get(general, general).replace('*', expert)}.{kind}"

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
        return tensor.to(self.device)

    def _check(self, names: Sequence[str], seen: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if seen != wanted:
            raise ModelError(f"{', '.join(names)}: the checkpoint has {list(seen)}, its config.json {list(wanted)}.")
