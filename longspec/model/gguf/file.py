"""A GGUF file as a checkpoint: Hugging Face names, fp32 values.

Takes a path; gives tensors one at a time, dequantized by the gguf package. The changes of llama.cpp's converter are
undone: the rows of q and k are put back in halves (Llama, SmolLM3), 1 is subtracted from Gemma's norm weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from longspec.errors import ModelError
from longspec.model.config_values import MOST_EXPERTS
from longspec.model.gguf.config import architecture_of, config_of, generation_config_of
from longspec.model.gguf.header import GgufHeader, GgufTensor, read_header
from longspec.model.gguf.tokenizer import build_tokenizer, tokenizer_config_of
from longspec.model.weights.quantized import FORMATS, STRIP, Blocks, Piece, missing_kernel

__all__ = ["GgufFile", "read_gguf"]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"} | {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}

# In the order of a converted file: q, k and v adjacent, and gate and up.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_up_exps": "mlp.experts.*.gate_up_proj",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_DELTA = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt": "linear_attn.dt_bias",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_OTHERWISE = {
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "mixtral": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
        "ffn_up_exps": "block_sparse_moe.experts.*.w3",
        "ffn_down_exps": "block_sparse_moe.experts.*.w2",
    },
    "gpt_oss": {"ffn_gate_inp": "mlp.router", "attn_sinks": "self_attn.sinks"},
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3_text": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma4_text": {
        "ffn_norm": "pre_feedforward_layernorm",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
        "layer_output_scale": "layer_scalar",
        "ffn_gate_inp": "router.proj",
        "ffn_gate_up_exps": "experts.*.gate_up_proj",
        "ffn_gate_exps": "experts.*.gate_proj",
        "ffn_up_exps": "experts.*.up_proj",
        "ffn_down_exps": "experts.*.down_proj",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_down_exps.scale": "router.per_expert_scale",
    },
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
"""By `model_type`."""
_STACKED = list(_LAYER).index("ffn_gate_up_exps")  # where experts' matrices stand among a layer's
_HEAD = {
    "nextn.eh_proj": "mtp.fc",
    "nextn.enorm": "mtp.pre_fc_norm_embedding",
    "nextn.hnorm": "mtp.pre_fc_norm_hidden",
    "nextn.shared_head_norm": "mtp.norm",
}
"""Of the first block behind the layers, a head that drafts, beside its layer."""

_SHIFTED = ("norm.weight", "norm_embedding.weight", "norm_hidden.weight")
_PLAIN = {"F64", "F32", "F16", "BF16"}
_IN_CONFIG = re.compile(r"(rope_freqs|rope_factors_long|rope_factors_short|blk\.\d+\.attn_rot_embd)\.weight")
_PLACE = re.compile(r"(?:blk\.(\d{1,5})\.)?([\w.]+?)(?:\.(weight|bias))?", re.ASCII)
_ONE_ROW = "shared_expert_gate.weight"  # a vector in the file
_BARE = ("A_log", "dt_bias", "layer_scalar", "per_expert_scale", "router.scale", "sinks")
"""How names end that have no suffix in a checkpoint."""


_Placed = tuple[tuple[int, ...], str, str, GgufTensor]
"""A tensor's place in the order of a converted file, Hugging Face's name, GGUF's, and where it lies."""


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file. Raises ModelError where it is damaged, or its architecture or a tensor isn't supported."""
    return GgufFile(read_header(path))


class GgufFile:
    """A GGUF file's tensors, under the names of a Hugging Face checkpoint."""

    def __init__(self, header: GgufHeader) -> None:
        self.path = header.path
        self.fields = header.fields
        self._header = header
        self._architecture = architecture_of(header)
        self._config = config_of(header)
        self._drafts = int(header.fields.get(f"{header.fields['general.architecture']}.nextn_predict_layers", 0))
        self._stored: dict[str, str] = {}  # Hugging Face's name to GGUF's, in the order of a converted file
        self._places: dict[str, GgufTensor] = {}  # by Hugging Face's name
        for name, stored, place in self._named():
            self._stored[name], self._places[name] = stored, place

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    def generation_config(self) -> dict[str, Any]:
        return generation_config_of(self._header)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file's fields. Raises ModelError where its kind or its pre-tokenizer isn't known."""
        return build_tokenizer(self.fields)

    def tokenizer_config(self) -> dict[str, Any]:
        return tokenizer_config_of(self.fields) | {"model_max_length": self._config["max_position_embeddings"]}

    @property
    def nbytes(self) -> int:
        """Bytes of the file, or of all its parts."""
        return self._header.nbytes

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._places[name].shape
        if name.endswith(_ONE_ROW) and len(shape) == 1:
            return (1, *shape)
        return (shape[0], 1, *shape[1:]) if name.endswith("conv1d.weight") else shape

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in fp32, one at a time."""
        return ((name, self.take(name)) for name in self._stored)

    def take(self, name: str) -> Tensor:
        """One tensor in fp32. Raises ModelError where its type can't be dequantized."""
        place = self._places[name]
        blocks = self.blocks(name) if missing_kernel() is None else None
        if blocks is not None and not blocks.size % STRIP:
            return Piece.of_blocks(blocks.format, [(blocks.read(), blocks.heads)], blocks.width).values()
        rows = self._rows(name).numpy()
        try:
            with np.errstate(all="ignore"):  # damaged steps make values that are no numbers, as logits then say
                tensor = torch.from_numpy(gguf.dequantize(rows, place.kind)).view(place.shape)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path} holds {self._stored[name]} as {place.kind.name}, which the gguf package can't dequantize."
            ) from error
        if self._architecture.norm_offset and name.endswith(_SHIFTED) and ".linear_attn." not in name:
            return tensor - self._architecture.norm_offset
        if name.endswith("A_log"):  # stored as what it stands for, -exp of it
            return torch.log(-tensor)
        if name.endswith(("conv1d.weight", _ONE_ROW)):
            return tensor.view(self.shape(name))
        if heads := self._rotated_heads(name):
            return _in_halves(tensor, heads)
        return tensor

    @property
    def formats(self) -> dict[str, int]:
        """Bytes by the type's name, the largest first."""
        return self._header.formats

    @property
    def coded(self) -> bool:
        """Whether most of its bytes are codes."""
        formats = self.formats
        return 2 * sum(nbytes for name, nbytes in formats.items() if name not in _PLAIN) > sum(formats.values())

    @property
    def recoded(self) -> list[str]:
        """Types of codes that no kernel reads: matrices in these are quantized anew from their values."""
        return sorted(self.formats.keys() - FORMATS.keys() - _PLAIN)

    def blocks(self, name: str) -> Blocks | None:
        """A matrix in the file's own codes; None where it holds values, or a type that has no kernel."""
        place = self._places[name]
        if len(place.shape) != 2 or place.kind.name not in FORMATS:
            return None
        return Blocks(place.kind.name, *place.shape, lambda: self._rows(name), self._rotated_heads(name))

    def release(self, name: str) -> None:
        """Let go of the file's pages that hold a tensor: they are read again where it is taken again."""
        self._places[name].release()

    def _rows(self, name: str) -> Tensor:
        """A tensor's bytes, row by row."""
        place = self._places[name]
        return torch.from_numpy(place.bytes).view(*place.shape[:-1], -1)

    def take_run(self, names: Sequence[str]) -> Tensor | None:
        """None: dequantized tensors have no neighbours."""
        return None

    def _rotated_heads(self, name: str) -> int:
        """The heads whose rows stand in pairs in the file; 0 for a tensor that has none."""
        if not self._architecture.permuted:
            return 0
        if ".q_proj." in name:
            return int(self._config["num_attention_heads"])
        return int(self._config["num_key_value_heads"]) if ".k_proj." in name else 0

    def _named(self) -> Iterator[tuple[str, str, GgufTensor]]:
        """Hugging Face's name, GGUF's, and the place of each tensor, of each matrix where a tensor stacks an expert's
        each.
        """
        kind, layers = str(self.fields["general.architecture"]), int(self._config["num_hidden_layers"])
        stems = {**_LAYER, **_OTHERWISE.get(str(self._config["model_type"]), {})}
        order = list(stems)
        placed: list[_Placed] = []
        for stored, tensor in self._header.tensors.items():
            if _IN_CONFIG.fullmatch(stored):
                continue
            match = _PLACE.fullmatch(stored)
            number, stem, suffix = match.groups() if match else (None, "", None)
            if number is None and stem in _TOP:
                at = layers if stem.startswith("output") else -1
                placed.append(((at, 0, 0), f"{_TOP[stem]}.{suffix}", stored, tensor))
            elif number is not None and int(number) < layers and stem in stems:
                name = stems[stem] if stems[stem].endswith(_BARE) else f"{stems[stem]}.{suffix}"
                where, name = (int(number), int(suffix == "bias")), f"model.layers.{number}.{name}"
                placed += _matrices(where, order.index(stem), name, stored, tensor)
            elif number is not None and layers <= int(number) < layers + self._drafts:
                if int(number) > layers or (stem not in _HEAD and stem not in stems):
                    continue  # of a second head, or a copy of the model's own tables
                name = _HEAD.get(stem) or f"mtp.layers.0.{stems[stem]}"
                placed += _matrices((layers + 1, 0), [*_HEAD, *order].index(stem), f"{name}.{suffix}", stored, tensor)
            else:
                raise ModelError(f"{self.path} holds the tensor {stored}, which {kind} models don't have.")
            rotated = self._rotated_heads(placed[-1][1])
            if rotated and tensor.shape[0] % (2 * rotated):
                raise ModelError(f"{self.path} holds {stored} with {tensor.shape[0]} rows for {rotated} heads.")
        return (entry[1:] for entry in sorted(placed, key=lambda entry: entry[:2]))


def _matrices(where: tuple[int, ...], order: int, name: str, stored: str, tensor: GgufTensor) -> list[_Placed]:
    """A tensor by its place, or where it stacks the experts' matrices each of them, an expert's beside each other.

    Raises:
        ModelError: there are more than a model has.
    """
    if "*" not in name or len(tensor.shape) != (2 if name.endswith(".bias") else 3):
        return [((*where, order), name, stored, tensor)]
    if tensor.shape[0] > MOST_EXPERTS:
        raise ModelError(f"{stored} stacks {tensor.shape[0]:,} experts; at most {MOST_EXPERTS:,} were expected.")
    parts = enumerate(tensor.parts())
    return [((*where, _STACKED, i, order), name.replace("*", str(i)), stored, part) for i, part in parts]


def _in_halves(tensor: Tensor, heads: int) -> Tensor:
    """Reorder rows from pairs (0, d/2, 1, d/2 + 1, ...), as llama.cpp rotates them, to halves (0, 1, ..., d/2, ...)."""
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
