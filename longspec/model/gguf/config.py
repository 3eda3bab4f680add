"""The fields of a GGUF header as a config.json.

Takes a header; gives a dict that transformers and our own `Config` both read. Knows the decoder's architectures, the
parameters that llama.cpp has in code instead of in the file, and no tensor but the rope factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from longspec.errors import ModelError
from longspec.machine.schema import check, shown, whole
from longspec.model.config_values import MOST_LAYERS
from longspec.model.gguf.fields import BY_LAYER, Fields
from longspec.model.gguf.gemma4 import gemma4
from longspec.model.gguf.header import GgufHeader

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "config_of", "generation_config_of"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A GGUF architecture's names in transformers, and llama.cpp's changes to its tensors."""

    model_type: str
    name: str  # transformers' class
    permuted: bool = False  # rows of q and k are interleaved in pairs, for llama.cpp's rotation
    norm_offset: float = 0.0  # added to the norm weights here, and not in the checkpoint's


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),  # Mistral too
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", permuted=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", norm_offset=1.0),
    "gemma4": Architecture("gemma4_text", "Gemma4ForCausalLM"),
    "phi3": Architecture("phi3", "Phi3ForCausalLM"),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM"),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM"),
    "olmoe": Architecture("olmoe", "OlmoeForCausalLM"),
    "gpt-oss": Architecture("gpt_oss", "GptOssForCausalLM"),
    "qwen35": Architecture("qwen3_5_text", "Qwen3_5ForCausalLM", norm_offset=1.0),
    "qwen35moe": Architecture("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", norm_offset=1.0),
}
"""By `general.architecture`."""

_MIXTURES = {"llama": Architecture("mixtral", "MixtralForCausalLM", permuted=True)}
"""Those that are another model where the file has experts."""

_WITH_EXPERTS = ("llama", "qwen3moe", "olmoe", "qwen35moe", "gpt-oss", "gemma4")

_END_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_IDS = ("bos", "padding", *_END_ROLES)
_WIDEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models


def architecture_of(header: GgufHeader) -> Architecture:
    """The architecture of a file. Raises ModelError, with the supported list, for an unknown one."""
    name = header.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"{header.path} holds the architecture {shown(name)}, which is not supported as GGUF; "
            f"longspec reads {', '.join(ARCHITECTURES)}."
        )
    if not header.fields.get(f"{name}.expert_count"):
        return ARCHITECTURES[name]
    if name not in _WITH_EXPERTS:
        raise ModelError(
            f"{header.path} is a {name} and a mixture of experts, which is not supported as GGUF; "
            f"those that longspec reads are {', '.join(_WITH_EXPERTS)}."
        )
    return _MIXTURES.get(name, ARCHITECTURES[name])


def config_of(header: GgufHeader) -> dict[str, Any]:
    """The config.json of the file's fields. Raises ModelError where one is missing or makes no sense."""
    fields = Fields(header)
    architecture = architecture_of(header)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"The tensor token_embd.weight is missing from {header.path}: the file is incomplete.")

    width, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", width // heads)
    context, drafts = fields.size("context_length"), int(fields.number("nextn_predict_layers", 0))
    layers = fields.size("block_count") - drafts  # a head that drafts is a block behind them
    if not 1 <= layers <= MOST_LAYERS:
        raise ModelError(f"{header.path} says that it has {layers:,} layers; 1 to {MOST_LAYERS:,} were expected.")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.name],
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": fields.size("feed_forward_length", fields.optional("expert_feed_forward_length")),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "rope_theta": fields.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(header, fields, context),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **({"mtp_num_hidden_layers": drafts} if drafts else {}),
        **generation_config_of(header),
    }
    rotated = fields.size("rope.dimension_count", head_dim)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    made = config | _experts(fields) | _peculiar(fields, config)
    if "rope_parameters" in made:  # which say all
        del made["rope_scaling"], made["rope_theta"]
    return made


def generation_config_of(header: GgufHeader) -> dict[str, Any]:
    """The generation_config.json: the tokens that begin and end a text, by their roles.

    Those that end one by their name are added when the model is loaded (`longspec.text.turn_ends`).
    """
    fields = header.fields
    first = {f"tokenizer.ggml.{name}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id") for name in _IDS}
    check(f"{header.path}", first, dict.fromkeys(first, whole(0, (1 << 31) - 1)), ModelError)
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in _END_ROLES]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": unique[0] if len(unique) == 1 else unique or None,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _experts(fields: Fields) -> dict[str, Any]:
    """The config fields of a mixture of experts."""
    if not fields.optional("expert_count"):
        return {}
    config: dict[str, Any] = {
        "num_experts": fields.size("expert_count"),
        "num_experts_per_tok": fields.size("expert_used_count"),
        "norm_topk_prob": fields.kind != "olmoe",  # constants of llama.cpp's code
    }
    if fields.kind in ("llama", "gpt-oss"):
        config["num_local_experts"] = config.pop("num_experts")
    for name, said in (("moe_intermediate_size", ""), ("shared_expert_intermediate_size", "shared_")):
        if (size := fields.optional(f"expert_{said}feed_forward_length")) is not None:
            config[name] = int(size)
    return config


def _peculiar(fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    """The config fields that only one family has."""
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    gemma2 = fields.kind == "gemma2"  # whose first files lack what llama.cpp has as defaults
    window = fields.optional("attention.sliding_window", 4096 if gemma2 else None)
    match fields.kind:
        case "gemma2" | "gemma3":
            every = 2 if gemma2 else 6  # llama.cpp's constants; a group's last layer is global
            full = [not window or (i + 1) % every == 0 for i in range(layers)]
            wide = layers == _WIDEST_GEMMA[fields.kind]
            peculiar = {
                "hidden_activation": "gelu_pytorch_tanh",
                "sliding_window": window or None,
                "layer_types": ["full_attention" if whole else "sliding_attention" for whole in full],
                "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if wide else head_dim,
                "attn_logit_softcapping": fields.optional("attn_logit_softcapping", 50.0 if gemma2 else None) or None,
                "final_logit_softcapping": fields.optional("final_logit_softcapping", 30.0 if gemma2 else None) or None,
            }
            if fields.kind == "gemma3":
                peculiar["rope_theta"] = fields.number("rope.freq_base", 1_000_000.0)
                peculiar["rope_local_base_freq"] = fields.number("rope.freq_base_swa", 10_000.0)
            return peculiar
        case "gemma4":
            return gemma4(fields, layers, head_dim)
        case "phi3":
            original = fields.size("rope.scaling.original_context_length", config["max_position_embeddings"])
            return {"sliding_window": window or None, "original_max_position_embeddings": original}
        case "gpt-oss":
            kinds = ("sliding_attention", "full_attention")  # a constant of llama.cpp's code
            scaling = config["rope_scaling"]
            return {
                "sliding_window": window or None,
                "layer_types": [kinds[i % 2 if window else 1] for i in range(layers)],
                # No field says so; llama.cpp rounds the ramp's ends, which the model was trained without.
                "rope_scaling": scaling and {**scaling, "truncate": False},
            }
        case "smollm3":
            return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)]}  # a constant of llama.cpp's code
        case "qwen35" | "qwen35moe":
            every, heads = fields.size("full_attention_interval", 4), fields.size("ssm.time_step_rank")
            return {
                "layer_types": ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)],
                "linear_num_key_heads": fields.size("ssm.group_count"),
                "linear_num_value_heads": heads,
                "linear_key_head_dim": fields.size("ssm.state_size"),
                "linear_value_head_dim": fields.size("ssm.inner_size") // heads,
                "linear_conv_kernel_dim": fields.size("ssm.conv_kernel"),
                "linear_value_heads_tiled": True,  # ours: their order in the file, which codes can't be taken out of
            }
        case "olmo2" if window is not None:
            raise ModelError("This GGUF is an OLMo 3 (olmo2 with a sliding window), which is not supported.")
        case _:
            return {}


def _rope_scaling(header: GgufHeader, fields: Fields, context: int) -> dict[str, Any] | None:
    kind = header.fields.get(f"{fields.kind}.rope.scaling.type")
    original = fields.size("rope.scaling.original_context_length", context)
    if "rope_factors_long.weight" in header.tensors:
        return {
            "rope_type": "longrope",
            "long_factor": fields.factors("rope_factors_long.weight"),
            "short_factor": fields.factors("rope_factors_short.weight"),
            "original_max_position_embeddings": original,
        }
    if "rope_freqs.weight" in header.tensors and fields.kind not in BY_LAYER:
        base = fields.number("rope.freq_base", 10_000.0)
        return _from_frequencies(fields.factors("rope_freqs.weight"), base, context)
    # llama.cpp's defaults: linear without a type, the older name of the factor, and 0 for none
    factor = fields.optional("rope.scaling.factor", fields.optional("rope.scale_linear")) or 1.0
    match kind:
        case None | "linear":
            whole_context = max(2, int(context / factor)) if factor > 1 else context  # the file says the lengthened one
            scaled = {"rope_type": "linear", "factor": factor, "original_max_position_embeddings": whole_context}
            return None if factor == 1.0 else scaled
        case "none":
            return None
        case "yarn":
            values = {
                "beta_fast": fields.optional("rope.scaling.yarn_beta_fast"),
                "beta_slow": fields.optional("rope.scaling.yarn_beta_slow"),
                "attention_factor": fields.optional("rope.scaling.yarn_attn_factor"),
            }
            return {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                **{name: value for name, value in values.items() if value is not None},
            }
        case _:
            raise ModelError(f"{header.path} has the rope scaling {shown(kind)}, which is not supported.")


def _from_frequencies(factors: list[float], theta: float, context: int) -> dict[str, Any]:
    """The stretch of each wavelength as `llama3` parameters where those reproduce these factors.

    Any other factors become a longrope with two equal sets and unscaled attention scores.
    """
    known = {"rope_type": "llama3", "factor": max(factors), **_LLAMA3}
    low, high, original = _LLAMA3.values()
    if theta <= 1:
        raise ModelError(f"The GGUF file says {theta} in rope.freq_base, where a number above 1 was expected.")
    turns = original * theta ** -(np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # within the original context
    blend = ((turns - low) / (high - low)).clip(0, 1)
    if np.allclose(1 / ((1 - blend) / max(factors) + blend), factors, rtol=1e-4):
        return known
    return {
        "rope_type": "longrope",
        "long_factor": factors,
        "short_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }
