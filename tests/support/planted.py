"""Models of which it is known what sub-layers they don't need."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import add_head, load, oracle, write
from support.engines import of_folder, vocabulary

from longspec.model.decoder import Skip
from longspec.model.load import Model

PLANTED = Skip(frozenset({2, 3, 4, 6}), frozenset({1, 3, 4, 5, 6}))


def planted(folder: Path, skip: Skip, heads: int = 4, **sizes: int) -> Model:
    """A model whose named sub-layers add a thousandth of what they would; it is sure of what it writes."""
    made = oracle("llama", num_attention_heads=heads, num_key_value_heads=heads // 2, **sizes)
    with torch.no_grad():
        for i, layer in enumerate(made.model.layers):
            layer.self_attn.o_proj.weight *= 0.001 if i in skip.attention else 1.0
            layer.mlp.down_proj.weight *= 0.001 if i in skip.mlp else 1.0
        made.lm_head.weight *= 10
    decoder = load(write(made, folder))
    return Model("planted", "fp32", decoder, vocabulary(decoder.config.vocabulary), (), {}, {})


def planted_head(folder: Path) -> Model:
    """A model that writes by its last token alone, and an MTP head that knows it: the embedding, passed on."""
    every = frozenset(range(4))
    planted(folder, Skip(every, every))
    held = load_file(add_head(folder) / "model.safetensors")
    behind = "model.layers.4."
    width = len(held["model.norm.weight"])
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        held[f"{behind}{name}.weight"].zero_()
    held[f"{behind}eh_proj.weight"] = torch.eye(width, 2 * width)
    held |= {f"{behind}{name}.weight": torch.ones(width) for name in ("enorm", "hnorm")}
    held[f"{behind}shared_head.norm.weight"] = held["model.norm.weight"].clone()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return of_folder(folder, ())


def eight_layers(folder: Path, **sizes: int) -> Model:
    """Of which half of the sub-layers are planted."""
    layers = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 4096}
    return planted(folder, PLANTED, **layers, **sizes)
