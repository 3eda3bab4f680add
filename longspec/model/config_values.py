"""What the values of a config.json must be: their types and ranges, checked before one is used.

Takes the dict; gives it with the family's defaults, or a ModelError that names the value. Sizes that pass can't
overflow a kernel's arithmetic, and a rotation lies within its head. Knows no tensor: shapes are compared with the
config where a weight is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspec.errors import ModelError
from longspec.machine.schema import FLAG, TABLE, TEXT, check, either, listed, number, shown, whole

__all__ = [
    "MOST_CONTEXT",
    "MOST_EXPERTS",
    "MOST_LAYERS",
    "MOST_LOOPS",
    "MOST_STATE_DIM",
    "TOKENS",
    "checked",
    "checked_rope",
    "turned",
]

MOST_LAYERS = 10_000
MOST_LOOPS = 1_000
MOST_CONTEXT = 1 << 30
MOST_EXPERTS = 1 << 14
MOST_STATE_DIM = 512
"""Of a head of linear attention, whose state is its square: published ones have 128. A file's bytes grow with the
dimension alone, so that a few megabytes could ask for a state of 17 GB.
"""

_MOST_WIDTH = 1 << 24
_MOST_HEADS = 1 << 16  # also a head's dimensions

_TOKEN = whole(0, (1 << 31) - 1)
TOKENS = either(_TOKEN, listed(_TOKEN, 1024))
"""The kind of `eos_token_id`."""

_SIZE, _HEADS = whole(1, _MOST_WIDTH), whole(1, _MOST_HEADS)
_CONTEXT, _BASE, _FACTOR = whole(2, MOST_CONTEXT), number(1, 1e15, above=True), number(1e-6, 1e6)
_SOFTCAP, _STATE_DIM = number(0, 1e9, above=True), whole(1, MOST_STATE_DIM)

_KINDS = {
    "vocab_size": whole(1, (1 << 31) - 1),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": whole(1, MOST_LAYERS),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _HEADS,
    "max_position_embeddings": _CONTEXT,
    "original_max_position_embeddings": _CONTEXT,
    "rms_norm_eps": number(0, 1),
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "eos_token_id": TOKENS,
    "tie_word_embeddings": FLAG,
    "use_sliding_window": FLAG,
    "sliding_window": whole(1, MOST_CONTEXT),
    "sliding_window_pattern": whole(1, MOST_LAYERS),
    "max_window_layers": whole(0, MOST_CONTEXT),
    "layer_types": listed(TEXT, MOST_LAYERS),
    "no_rope_layers": listed(either(FLAG, whole(0, 1)), MOST_LAYERS),
    "no_rope_layer_interval": whole(1, MOST_LAYERS),
    "rope_theta": _BASE,
    "rope_local_base_freq": _BASE,
    "rope_scaling": TABLE,
    "per_layer_config": TABLE,
    "global_head_dim": _HEADS,
    "num_global_key_value_heads": _HEADS,
    "num_kv_shared_layers": whole(0, MOST_LAYERS),
    "hidden_size_per_layer_input": whole(0, _MOST_WIDTH),
    "vocab_size_per_layer_input": whole(0, (1 << 31) - 1),
    "use_double_wide_mlp": FLAG,
    "attention_k_eq_v": FLAG,
    "enable_moe_block": FLAG,
    "rope_parameters": TABLE,
    "partial_rotary_factor": number(0, 1, above=True),
    "query_pre_attn_scalar": number(0, 1e9, above=True),
    "attn_logit_softcapping": _SOFTCAP,
    "final_logit_softcapping": _SOFTCAP,
    "linear_num_key_heads": _HEADS,
    "linear_num_value_heads": _HEADS,
    "linear_key_head_dim": _STATE_DIM,
    "linear_value_head_dim": _STATE_DIM,
    "linear_conv_kernel_dim": whole(2, 127),
    "linear_group_size": whole(1, MOST_CONTEXT),
    "conv_L_cache": whole(2, 64),
    "full_attention_interval": whole(1, MOST_LAYERS),
    "full_attn_idxs": listed(whole(0, MOST_LAYERS), MOST_LAYERS),
    "decoder_sparse_step": whole(1, MOST_LAYERS),
    "mlp_only_layers": listed(whole(0, MOST_LAYERS), MOST_LAYERS),
    "num_experts": whole(0, MOST_EXPERTS),
    "num_local_experts": whole(0, MOST_EXPERTS),
    "num_experts_per_tok": whole(1, MOST_EXPERTS),
    "top_k_experts": whole(1, MOST_EXPERTS),
    "moe_intermediate_size": _SIZE,
    "shared_expert_intermediate_size": whole(0, _MOST_WIDTH),
    "num_dense_layers": whole(0, MOST_LAYERS),
    "norm_topk_prob": FLAG,
    "use_expert_bias": FLAG,
    "routed_scaling_factor": number(0, 1e6, above=True),
    "total_ut_steps": whole(1, MOST_LOOPS),
    "early_exit_threshold": number(0, 1e6),
    "early_exit_step": whole(0, MOST_LOOPS),
    "swiglu_alpha": number(0, 1e6),
    "swiglu_limit": number(0, 1e6),
}
_NEEDED = frozenset(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))

_ROPE = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": _BASE,
    "partial_rotary_factor": number(0, 1, above=True),
    "original_max_position_embeddings": _CONTEXT,
    "factor": _FACTOR,
    "attention_factor": _FACTOR,
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "beta_fast": _FACTOR,
    "beta_slow": _FACTOR,
    "mscale": number(0, 1e6),
    "mscale_all_dim": number(0, 1e6),
    "truncate": FLAG,
    "short_factor": listed(_FACTOR, _MOST_HEADS),
    "long_factor": listed(_FACTOR, _MOST_HEADS),
}
_ROPE_NEEDED = {
    "llama3": frozenset(("factor", "low_freq_factor", "high_freq_factor")),
    "longrope": frozenset(("short_factor", "long_factor")),
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {  # transformers' Gemma3TextConfig: published files hold few of these
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1_000_000.0,
        "eos_token_id": 1,
    },
    "gemma4_text": {  # transformers' Gemma4TextConfig
        "vocab_size": 262_144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "eos_token_id": 1,
    },
    "gpt_oss": {"head_dim": 64, "sliding_window": 128, "rms_norm_eps": 1e-5},
}


def checked(family: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the family's defaults in place of what is missing.

    Raises:
        ModelError: a value isn't of its type or out of its range, or a size is missing.
    """
    values = {**_DEFAULTS.get(family, {}), **raw}
    if family == "llama" or (
        family in ("qwen2", "qwen3", "qwen3_moe", "smollm3", "ouro") and not raw.get("use_sliding_window")
    ):
        values["sliding_window"] = None  # what such a file says of it isn't used
    check("The model's config.json can't be used: it", values, _KINDS, ModelError, needed=_NEEDED)
    if values["num_attention_heads"] % (values.get("num_key_value_heads") or values["num_attention_heads"]):
        raise ModelError(
            f"The model's config.json can't be used: it has {values['num_attention_heads']} heads for queries and "
            f"{values['num_key_value_heads']} for keys, where a multiple was expected."
        )
    layers: int = values["num_hidden_layers"]
    kinds, flags = values.get("layer_types"), values.get("no_rope_layers")
    if (kinds is not None and len(kinds) != layers) or (flags is not None and len(flags) < layers):
        raise ModelError(f"The model's config.json lists other layers than its {layers} (layer_types, no_rope_layers).")
    return values


def checked_rope(kind: str, values: object) -> dict[str, Any]:
    """The known parameters of one kind of rope, of which none is null.

    Raises:
        ModelError: a parameter is missing, of another type or out of range.
    """
    where = f"The model's config.json, in its rope ({kind}),"
    if not isinstance(values, Mapping):
        raise ModelError(f"{where} has {shown(values)}, where an object was expected.")
    check(where, values, _ROPE, ModelError, needed=_ROPE_NEEDED.get(kind, frozenset()))
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ModelError(f"{where} has a low_freq_factor that isn't below its high_freq_factor.")
    return {name: values[name] for name in values if name in _ROPE and values[name] is not None}


def turned(kind: str, values: Mapping[str, Any], partial: float, head_dim: int) -> int:
    """The dimensions of a head that a rope turns: this part of the head's.

    Raises:
        ModelError: they are odd or none, or the rope's lists have factors for others.
    """
    dims = int(head_dim * partial + 1e-6)  # 44 * (30 / 44) is below 30
    if kind == "proportional":  # pairs lie as in a whole head, and most have no angle
        dims = head_dim
    if dims % 2 or not 2 <= dims <= head_dim:
        raise ModelError(
            f"The model's config.json turns {dims} dimensions of each head; an even number from 2 to the head's "
            f"{head_dim} was expected."
        )
    lengths = [len(values[name]) for name in ("short_factor", "long_factor")] if kind == "longrope" else []
    if any(length != dims // 2 for length in lengths):
        raise ModelError(
            f"The model's config.json has {lengths} factors for a rope of {dims} dimensions; {dims // 2} were expected."
        )
    return dims
