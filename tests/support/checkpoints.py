"""Tiny random checkpoints of every family, made and written by transformers: the oracle's own files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.linearised import Linearised
from support.looped import Looped

from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.weights.read import Weights

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
}
_DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv", "conv"]}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_WINDOW = {"sliding_window": 24}
_GEMMA4 = {
    **_WINDOW,
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": _LLAMA3, "head_dim": 16}),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "mistral": ("Mistral", {**_WINDOW}),
    "qwen2": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen2-window": ("Qwen2", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4}),
    "gemma2": ("Gemma2", {**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 12}),
    "gemma3": (
        "Gemma3",
        {
            **_WINDOW,
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            **_GEMMA4,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
        },
    ),
    "gemma4-keys": (
        "Gemma4",
        {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    ),
    "gemma4_moe": (
        "Gemma4",
        {
            **_GEMMA4,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 3,
            "moe_intermediate_size": 32,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "gemma4_unified": ("Gemma4Unified", {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "phi3": ("Phi3", {**_WINDOW}),
    "phi3-longrope": (
        "Phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 256, "sliding_window": None},
    ),
    "olmo2": ("Olmo2", {}),
    "qwen3_5": ("Qwen3_5", {**_DELTA, "head_dim": 16}),
    "qwen3_5-wide": ("Qwen3_5", {**_DELTA, "head_dim": 32, "linear_num_value_heads": 6, "tie_word_embeddings": True}),
    "qwen3_next": (
        "Qwen3Next",
        {**_DELTA, "head_dim": 16, "linear_num_value_heads": 6, "linear_value_head_dim": 8, "num_experts": 0},
    ),
    "lfm2": ("Lfm2", {**_CONVOLUTIONS, "block_multiple_of": 16}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe-unnormed": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16, "decoder_sparse_step": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 32}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**_DELTA, **_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 64}),
    "qwen3_next_moe": ("Qwen3Next", {**_DELTA, **_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 64}),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "head_dim": 16,
            "sliding_window": 24,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
    "lfm2_moe": ("Lfm2Moe", {**_CONVOLUTIONS, **_EXPERTS, "num_dense_layers": 1, "routed_scaling_factor": 1.5}),
    "ouro": ("Ouro", {"model_type": "ouro", "num_hidden_layers": 2, "total_ut_steps": 4}),
    "linear_llama": ("LinearLlama", {"model_type": "linear_llama", "linear_conv_kernel_dim": 63}),
    "linear_llama-some": (
        "LinearLlama",
        {
            "model_type": "linear_llama",
            "linear_conv_kernel_dim": 9,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        },
    ),
}


_LAYER = re.compile(r"(.*)layers\.(\d+)\.(.+)")


_NAIVE: dict[str, Any] = {"Ouro": Looped, "LinearLlama": Linearised}
_WITH_IMAGES = ("Gemma3", "Gemma4", "Gemma4Unified", "Qwen3_5", "Qwen3_5Moe")


def oracle(name: str, **changes: Any) -> Any:
    """The family's transformers model: fp32, eager attention, random weights, norms and biases too. Ouro and linearised
    Llamas, which have none, are naive models of our own.
    """
    family, extra = FAMILIES[name]
    if family in _NAIVE:
        return _NAIVE[family]({**_COMMON, **extra, **changes})
    import transformers

    config_class = getattr(transformers, f"{family}TextConfig" if family in _WITH_IMAGES else f"{family}Config")
    config = config_class(**{**_COMMON, **extra, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.15
            parameter.add_(torch.randn_like(parameter) * scale)
            if name.endswith("gate_up_proj_bias"):  # beyond where gpt-oss clamps
                parameter.mul_(20.0)
            if name.endswith("sinks"):
                parameter.add_(1.0)
            if name.endswith("A_log"):  # a state that fades at once holds nothing, and its norm amplifies rounding
                parameter.sub_(3.0)
        for name, buffer in model.named_buffers():
            if name.endswith(("expert_bias", "layer_scalar")):
                buffer.add_(torch.randn_like(buffer) * 0.3)
    return model


def write(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def add_head(folder: Path, layout: str = "deepseek") -> Path:
    """Write a random MTP head into a checkpoint, since transformers drops them: one more block like its last attention
    layer, called as DeepSeek calls it, or as Qwen3.5 does (`qwen`).
    """
    held, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(9)
    found = [match for match in map(_LAYER.fullmatch, held) if match is not None]
    last = max(int(match[2]) for match in found if "self_attn" in match[3])
    behind = f"{found[0][1]}layers.{1 + max(int(match[2]) for match in found)}."
    fc, token, state, norm = ("eh_proj", "enorm", "hnorm", "shared_head.norm")
    if layout == "qwen":
        behind, (fc, token, state, norm) = "mtp.", ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    block = {match[3]: held[match[0]] for match in found if int(match[2]) == last}
    width = held[f"{found[0][1]}embed_tokens.weight"].shape[1]
    like = {f"{behind}{name}.weight": torch.zeros(width) for name in (token, state, norm)}
    like |= {f"{behind}{fc}.weight": torch.zeros(width, 2 * width)}
    like |= {f"{behind}{'layers.0.' if layout == 'qwen' else ''}{name}": tensor for name, tensor in block.items()}
    made = {name: tensor + torch.randn(tensor.shape, generator=generator) * 0.15 for name, tensor in like.items()}
    save_file({**held, **made}, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(
    folder: Path, dtype: torch.dtype = torch.float32, *, strict: bool = False, coded: str | None = None
) -> Decoder:
    """The decoder of a folder on the CPU."""
    config = Config.read(json.loads((folder / "config.json").read_text()))
    return Decoder(config, Weights.of_folder(folder, dtype), torch.device("cpu"), strict=strict, coded=coded)
