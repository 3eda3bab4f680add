"""Tiny GGUF files, written as llama.cpp's converter writes them, from transformers' own tiny models."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from support.blocks import quantized
from torch import Tensor

ALPHABET = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", *string.ascii_letters, *string.digits, *".,!?'", "Ċ"]
MERGES = ["a n", "t h", "th e", "Ġ a"]
SUPPORTED = {"mistral": "llama", "gemma3_text": "gemma3", "qwen3_5_text": "qwen35"} | {
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "qwen3_5_moe_text": "qwen35moe",
    "gpt_oss": "gpt-oss",
    "gemma4_text": "gemma4",
}
"""model_type to GGUF's architecture, where they differ."""


def write_gguf(
    model: Any,
    path: Path,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    matrices: gguf.GGMLQuantizationType | None = None,
    others: Mapping[str, gguf.GGMLQuantizationType] = {},
    split: int = 0,
    blocks: int = 0,
) -> Path:
    """The model as a GGUF file in fp32, its matrices of another kind if one is given, and of others by what stands in
    their GGUF names; in files of `split` tensors if that isn't 0. `change` may add fields before it is written. blocks:
    more than the model's layers.
    """
    config = model.config
    kind = SUPPORTED.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, kind, split_max_tensors=split)
    _add_shape(writer, config, kind, blocks)
    add_tokenizer(writer, config.vocab_size)
    change(writer)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == kind)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    held, family = model.state_dict().items(), config.model_type
    state = [each for name, tensor in held for each in _gate_and_up(name, tensor, family)]
    for name, tensor in state:
        if name == "lm_head.weight" and tied:
            continue
        stored = _EXPERTS.get(name.partition(".mlp.")[2].removesuffix("_bias"))
        if kind == "gemma4" and (place := next((p for p in _GEMMA4 if name.endswith(p)), None)):
            stored = f"blk.{name.split('.')[2]}.{_GEMMA4[place]}"
        elif stored is not None:
            stored = f"blk.{name.split('.')[2]}.{stored}.{'bias' if name.endswith('_bias') else 'weight'}"
        else:
            stored = names.get_name(name.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        stored += ".weight" if stored.endswith(("attn_sinks", "layer_output_scale")) else ""
        values = _as_stored(tensor, name, config, kind).contiguous().numpy()
        of_matrix = next((other for part, other in others.items() if part in stored), matrices)
        if of_matrix is None or values.ndim == 1:
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, quantized(values, of_matrix), raw_dtype=of_matrix)
    finish(writer)
    return path


_EXPERTS = {
    "gate.weight": "ffn_gate_inp",
    "router.weight": "ffn_gate_inp",
    "experts.gate_proj": "ffn_gate_exps",
    "experts.up_proj": "ffn_up_exps",
    "experts.down_proj": "ffn_down_exps",
    "shared_expert_gate.weight": "ffn_gate_inp_shexp",
    "shared_expert.gate_proj.weight": "ffn_gate_shexp",
    "shared_expert.up_proj.weight": "ffn_up_shexp",
    "shared_expert.down_proj.weight": "ffn_down_shexp",
}


_GEMMA4 = {
    "router.scale": "ffn_gate_inp.scale",
    "per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}


def _gate_and_up(name: str, tensor: Tensor, family: str) -> Iterator[tuple[str, Tensor]]:
    """The experts' gates and ups, which transformers has in one tensor [experts, 2 channels, width]; gpt-oss's are
    [experts, width, 2 channels], in turns, with biases.
    """
    halves: tuple[Tensor, ...]
    if family == "gpt_oss" and ".experts." in name:
        name, bias = name.removesuffix("_bias"), "_bias" if name.endswith("_bias") else ""
        rows = tensor if bias else tensor.transpose(1, 2)
        halves = (rows[:, 0::2], rows[:, 1::2]) if name.endswith("gate_up_proj") else (rows,)
    elif name.endswith("experts.gate_up_proj") and family != "gemma4_text":
        halves, bias = tensor.chunk(2, 1), ""
    else:
        yield name, tensor
        return
    for part, half in zip(("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",), halves, strict=True):
        yield name.replace("gate_up_proj", part) + bias, half


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, size: int, pre: str = "smollm") -> None:
    """A byte-level tokenizer of `size` tokens: letters, digits, four merges, three control tokens, and padding."""
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * (size - len(kinds)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def _add_shape(writer: gguf.GGUFWriter, config: Any, kind: str, blocks: int) -> None:
    sizes = config.per_layer_config[0] if kind == "gemma4" else config
    head_dim = getattr(sizes, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(blocks or config.num_hidden_layers)
    if hasattr(config, "intermediate_size") and not getattr(config, "use_double_wide_mlp", False):
        writer.add_feed_forward_length(config.intermediate_size)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if kind == "gemma4":
        _add_gemma4(writer, config)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    every = config.rope_parameters
    rope = every.get("full_attention", every)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "gemma3":
        writer.add_rope_freq_base_swa(every["sliding_attention"]["rope_theta"])
    if kind in ("gemma2", "gemma3", "phi3", "gpt-oss"):
        writer.add_sliding_window(config.sliding_window or 0)
    if kind in ("qwen35", "qwen35moe"):
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
        writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_rope_scaling(writer, rope, head_dim)


def _add_gemma4(writer: gguf.GGUFWriter, config: Any) -> None:
    """As llama.cpp's converter: what differs between layers as lists."""
    local, layers = [kind == "sliding_attention" for kind in config.layer_types], range(config.num_hidden_layers)
    each = [config.per_layer_config[i] for i in layers]
    whole = each[local.index(False)]
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(whole.head_dim)
    writer.add_key_length_swa(each[local.index(True)].head_dim)
    keys = [one.num_key_value_heads for one in each]
    writer.add_head_count_kv(keys if config.attention_k_eq_v else keys[0])
    if config.use_double_wide_mlp:
        first = config.num_hidden_layers - config.num_kv_shared_layers
        writer.add_feed_forward_length([config.intermediate_size * (1 + (i >= first)) for i in layers])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(local)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.enable_moe_block:
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_count(config.num_experts)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    pairs = whole.head_dim // 2
    turned = int(rope["full_attention"]["partial_rotary_factor"] * pairs)
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turned + [1e30] * (pairs - turned), np.float32))


def _add_rope_scaling(writer: gguf.GGUFWriter, rope: dict[str, Any], head_dim: int) -> None:
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case "longrope":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
            writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
        case "llama3":
            writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim))


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original, factors = rope["original_max_position_embeddings"], []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        blend = (original / wavelength - low) / (high - low)
        stretched = 1 / ((1 - blend) / factor + blend)
        factors.append(1.0 if wavelength < original / high else factor if wavelength > original / low else stretched)
    return np.array(factors, np.float32)


def _as_stored(tensor: Tensor, name: str, config: Any, kind: str) -> Tensor:
    if kind in ("qwen35", "qwen35moe") and ".linear_attn." in name:
        return _linear_attention(tensor, name, config)
    if kind.startswith(("gemma2", "gemma3", "qwen35")) and name.endswith("norm.weight"):
        return tensor + 1
    if name.endswith("shared_expert_gate.weight"):
        return tensor[0]
    if kind not in ("llama", "smollm3"):
        return tensor.to(torch.float32)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for which, count in heads.items():
        if f".{which}_proj." in name:  # halves to pairs
            halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
            return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor.to(torch.float32)


def _linear_attention(tensor: Tensor, name: str, config: Any) -> Tensor:
    """As llama.cpp's converter has it: what the decay is, no dimension of one, and value heads tiled over key heads."""
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    if name.endswith("conv1d.weight"):
        tensor = tensor.squeeze(1)
    keys, heads, dim = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    first = 2 * keys * config.linear_key_head_dim if "in_proj_qkv" in name or "conv1d" in name else 0
    if name.endswith("linear_attn.norm.weight") or heads == keys:
        return tensor
    if name.endswith("out_proj.weight"):
        return tensor.view(len(tensor), keys, heads // keys, dim).transpose(1, 2).reshape(tensor.shape)
    rows = tensor[first:]
    tiled = rows.reshape(keys, heads // keys, len(rows) // heads, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
    return torch.cat((tensor[:first], tiled))
