"""A Gemma 4's GGUF fields as a config.json: what differs between its layers stands in lists.

Takes the fields; gives the part of a config.json that no other family has.
"""

from __future__ import annotations

from typing import Any

from longspec.errors import ModelError
from longspec.model.gguf.fields import Fields

__all__ = ["gemma4"]

_STILL = 1e9
"""The stretch of a wavelength from which on a pair of channels doesn't turn."""


def gemma4(fields: Fields, layers: int, head_dim: int) -> dict[str, Any]:
    """The config fields that only Gemma 4 has. head_dim: of global layers.

    Raises:
        ModelError: a list isn't one value for each layer, all layers are alike, or a tensor is missing.
    """
    header = fields.header
    local, keys = (
        fields.flags("attention.sliding_window_pattern", layers),
        fields.listed("attention.head_count_kv", layers),
    )
    channels, inputs = (
        fields.listed("feed_forward_length", layers),
        int(fields.number("embedding_length_per_layer_input", 0)),
    )
    if all(local) or not any(local):
        raise ModelError(f"{header.path} is a gemma4 whose layers are all alike, where two kinds were expected.")
    whole, near = local.index(False), local.index(True)
    table = header.tensors.get("per_layer_token_embd.weight")
    if inputs and table is None:
        raise ModelError(
            f"The tensor per_layer_token_embd.weight is missing from {header.path}: the file is incomplete."
        )
    factors = fields.factors("rope_freqs.weight")  # 1 for a global layer's pairs that turn, and huge for the rest
    turned = sum(factor < _STILL for factor in factors) / len(factors)
    mixed = fields.optional("expert_count")
    return {
        **({"enable_moe_block": True, "top_k_experts": fields.size("expert_used_count")} if mixed else {}),
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": fields.size("attention.key_length_swa"),
        "global_head_dim": head_dim,
        "num_key_value_heads": keys[near],
        "num_global_key_value_heads": keys[whole],
        "attention_k_eq_v": f"blk.{whole}.attn_v.weight" not in header.tensors,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in local],
        "sliding_window": fields.size("attention.sliding_window"),
        "num_kv_shared_layers": int(fields.number("attention.shared_kv_layers", 0)),
        "intermediate_size": min(channels),
        "use_double_wide_mlp": max(channels) > min(channels),
        "hidden_size_per_layer_input": inputs,
        "vocab_size_per_layer_input": table.shape[0] if table is not None else 0,
        "final_logit_softcapping": fields.optional("final_logit_softcapping") or None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": turned,
                "rope_theta": fields.number("rope.freq_base", 1_000_000.0),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", 10_000.0)},
        },
    }
