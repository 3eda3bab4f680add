"""Mixtures of experts: what a family's config.json says of them, as a `Mixture`.

Takes the dict; knows no file and no tensor. One more such family is its defaults in _DEFAULTS, and what its layers'
rule is in `_sparse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from longspec.errors import ModelError

__all__ = ["MIXTURES", "Mixture", "mixture_of"]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False},
    "mixtral": {"num_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    "qwen3_next": {
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "qwen3_5_moe_text": {
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "lfm2_moe": {
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "use_expert_bias": True,
    },
    "gemma4_text": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "gpt_oss": {"num_local_experts": 128, "num_experts_per_tok": 4},
}
"""By family: what transformers' config class says where config.json doesn't."""

MIXTURES = tuple(_DEFAULTS)
"""Values of `model_type`."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sizes of a mixture of experts, and how a row chooses among them."""

    experts: int
    chosen: int  # experts of a row, the shared one not counted
    width: int  # an expert's channels
    layers: tuple[bool, ...]  # those that have experts; the others have one MLP
    shared: int = 0  # channels of the expert that every row goes through, times a gate of its own; 0 for none
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True  # the weights of a row's experts sum up to 1
    biased: bool = False  # a bias has a say in which experts are chosen, and none in their weights
    logit_bias: bool = False  # the router's product has a bias
    scale: float = 1.0  # multiplies the weights

    def union(self, rows: float) -> float:
        """Experts that a pass of so many rows is expected to go through, if each row chooses at random."""
        missed: float = (1 - self.chosen / self.experts) ** rows
        return self.experts * (1 - missed)


def mixture_of(family: str, raw: Mapping[str, Any], layers: int) -> Mixture | None:
    """The mixture of a config.json; None where no layer has experts. ModelError where it contradicts itself."""
    if family not in _DEFAULTS or (family == "gemma4_text" and not raw.get("enable_moe_block")):
        return None
    said = {**_DEFAULTS[family], **{name: value for name, value in raw.items() if value is not None}}
    experts: int = said.get("num_local_experts", said.get("num_experts", 0))
    chosen: int = said.get("top_k_experts", said.get("num_experts_per_tok", 0))
    sparse = _sparse(family, said, layers)
    if not experts or not any(sparse):
        return None
    if chosen > experts:
        raise ModelError(f"config.json says that each token goes through {chosen} of {experts} experts.")
    if said.get("clip_qkv") is not None:
        raise ModelError(f"This {family} clips queries, keys and values (clip_qkv), which is not supported.")
    if family == "gpt_oss" and (said.get("swiglu_alpha", 1.702), said.get("swiglu_limit", 7.0)) != (1.702, 7.0):
        raise ModelError(
            "This gpt_oss clamps its MLPs otherwise than at 7 with a slope of 1.702, which isn't supported."
        )
    lfm2 = family == "lfm2_moe"
    return Mixture(
        experts,
        chosen,
        width=said.get("moe_intermediate_size") or said["intermediate_size"],
        layers=sparse,
        shared=said.get("shared_expert_intermediate_size", 0),
        score="sigmoid" if lfm2 else "softmax",
        normalised=bool(said.get("norm_topk_prob", True))
        or family in ("mixtral", "qwen3_5_moe_text", "gpt_oss", "gemma4_text"),
        biased=lfm2 and bool(said["use_expert_bias"]),
        logit_bias=family == "gpt_oss",
        scale=float(said.get("routed_scaling_factor", 1.0)) if lfm2 else 1.0,
    )


def _sparse(family: str, said: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Per layer: whether it has experts."""
    if family == "lfm2_moe":
        return tuple(i >= said["num_dense_layers"] for i in range(layers))
    dense, every = said.get("mlp_only_layers", ()), said.get("decoder_sparse_step", 1)
    if family not in ("qwen3_moe", "qwen3_next"):
        dense, every = (), 1
    return tuple(i not in dense and (i + 1) % every == 0 for i in range(layers))
