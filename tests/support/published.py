"""Heads as other people publish them: tiny, random, in the layouts of EAGLE-3 and Medusa."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from longspec.model.load import Model

LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
BLOCKS = ["dflash", "dflash sliding", "dspark", "dspark gated", "dspark rnn"]
LAYOUTS = ["authors", "speculators", "medusa", "medusa with heads", *BLOCKS]


def write(folder: Path, layout: str, model: Model) -> Path:
    """A random head, as its publishers would write it."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1) + (len(shape) == 1)

    config, width, vocabulary = model.decoder.config, model.decoder.config.width, model.decoder.config.vocabulary
    folder.mkdir()
    if layout.startswith("medusa"):
        tensors: dict[str, Tensor] = {}
        for k in range(3):
            tensors |= {f"{k}.0.linear.weight": random(width, width), f"{k}.0.linear.bias": random(width)}
            if layout == "medusa with heads":
                tensors[f"{k}.1.weight"] = random(vocabulary, width)
        save_file(tensors, folder / "medusa_lm_head.safetensors")
        (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_num_layers": 1}))
        return folder
    if layout in BLOCKS:
        return _blocks(folder, layout, config, random)
    chosen = torch.tensor([i for i in range(vocabulary) if i % 3])
    shapes = {
        "input_layernorm": (32,), "hidden_norm": (32,), "post_attention_layernorm": (32,),
        "self_attn.q_proj": (32, 64), "self_attn.k_proj": (16, 64), "self_attn.v_proj": (16, 64),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
    }  # fmt: skip
    prefix = "midlayer" if layout == "authors" else "layers.0"
    tensors = {f"{prefix}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    tensors |= {
        "fc.weight": random(32, 3 * width),
        "norm.weight": random(32),
        "lm_head.weight": random(len(chosen), 32),
    }
    tensors |= {"embed_tokens.weight": random(vocabulary, 32), "d2t": chosen - torch.arange(len(chosen))}
    tensors["t2d"] = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, chosen, True)
    save_file(tensors, folder / "model.safetensors")
    layer = {**LAYER, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 5000.0}
    raw: dict[str, Any] = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(chosen)}
    raw |= {**layer, "vocab_size": vocabulary}
    if layout == "speculators":
        proposal = {"proposal_type": "greedy", "speculative_tokens": 4}
        raw = {
            "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "norm_before_residual": True,
            "draft_vocab_size": len(chosen), "transformer_layer_config": {**layer, "vocab_size": vocabulary},
            "speculators_config": {"algorithm": "eagle3", "proposal_methods": [proposal]},
            "eagle_aux_hidden_state_layer_ids": [1, config.layers // 2, config.layers],
        }  # fmt: skip
    else:
        raw["eagle_aux_hidden_state_layer_ids"] = [1, 2, config.layers]
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def _blocks(folder: Path, layout: str, config: Any, random: Any) -> Path:
    """A block drafter of two layers, over some of the target's tokens or, sliding, over all."""
    width, vocabulary, rank = config.width, config.vocabulary, 6
    chosen = torch.tensor([i for i in range(vocabulary) if i % 3 or layout == "dflash sliding"])
    shapes: dict[str, tuple[int, ...]] = {"fc": (width, 3 * width), "hidden_norm": (width,), "norm": (width,)}
    for layer in range(2):
        own = {
            "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_norm": (8,),
            "self_attn.k_norm": (8,), "self_attn.q_proj": (32, width), "self_attn.k_proj": (16, width),
            "self_attn.v_proj": (16, width), "self_attn.o_proj": (width, 32), "mlp.gate_proj": (40, width),
            "mlp.up_proj": (40, width), "mlp.down_proj": (width, 40),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    if layout.startswith("dspark"):
        shapes |= {"markov_head.markov_w1": (vocabulary, rank), "markov_head.markov_w2": (len(chosen), rank)}
        shapes |= {"confidence_head.proj": (1, width + rank)}
    shapes |= {"markov_head.gate_proj": (rank, width + rank)} if layout == "dspark gated" else {}
    shapes |= {"markov_head.joint_proj": (3 * rank, 2 * rank + width)} if layout == "dspark rnn" else {}
    tensors = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    biased = ("confidence_head.proj", "markov_head.gate_proj", "markov_head.joint_proj")
    tensors |= {f"{name}.bias": random(shapes[name][0]) - 1 for name in biased if name in shapes}
    sizes: dict[str, Any] = {
        "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": width, "intermediate_size": 40,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
        "max_position_embeddings": 256, "vocab_size": vocabulary,
    }  # fmt: skip
    if layout == "dflash sliding":
        sizes |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
    else:
        tensors |= {"lm_head.weight": random(len(chosen), width), "d2t": chosen - torch.arange(len(chosen))}
        tensors["t2d"] = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, chosen, True)
    kind = layout.split()[0]
    raw = {
        "architectures": ["DFlashSpeculator"], "speculators_model_type": kind, "draft_vocab_size": len(chosen),
        "block_size": 6, "mask_token_id": 5, "sample_from_anchor": kind == "dspark", "transformer_layer_config": sizes,
        "aux_hidden_state_layer_ids": [1, config.layers // 2, config.layers],
    }  # fmt: skip
    raw |= {"markov_rank": rank} if kind == "dspark" else {}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return folder
