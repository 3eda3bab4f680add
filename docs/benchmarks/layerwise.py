"""A GGUF file's values in fp32 where they don't fit into memory: by one layer after the other, ours and transformers'.

`decoder` gives a decoder whose layers are unpacked into two buffers, in turns, as its passes come to them. `choices`
runs transformers' layers over whole texts, each unpacked by the gguf package as it is reached. What is read again for
each pass costs time; nothing here is a timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longspec.model.decoder import Decoder
from longspec.model.load import Opened
from longspec.model.weights.footprint import shapes_of
from longspec.model.weights.read import Weights
from longspec.model.weights.ring import Ring
from longspec.model.weights.streamed import Streamed, _placed
from longspec.model.weights.unit_file import Unit
from longspec.model.weights.valueless import LINE, Valueless, padded

__all__ = ["choices", "decoder"]


class _Unpacked:
    """A file of units that was never written: a layer's matrices are unpacked where they are asked for."""

    def __init__(self, weights: Weights, shapes: Valueless) -> None:
        self.units = {unit: Unit(0, nbytes, 0) for unit, nbytes in shapes.sizes.items()}
        self._weights, self._held = weights, shapes.units
        self.nbytes_read = 0  # of a file

    def read(self, unit: Any, room: Tensor) -> None:
        at = 0
        for names in self._held[unit]:
            made = self._weights.joined(names).view(torch.uint8).flatten()
            room[at : at + len(made)] = made
            at += padded(len(made), LINE)

    def close(self) -> None:
        """Nothing is open."""


class _Layerwise(Streamed):
    def __init__(self, weights: Weights, shapes: Valueless) -> None:
        Weights.__init__(self, weights._sources, weights.dtype)
        file: Any = _Unpacked(Weights(weights._sources, weights.dtype), shapes)
        self.ring = self._layers = Ring(file, [unit for unit in shapes.sizes if isinstance(unit, int)], [], 2)
        self._places = {
            names: (unit, at, made) for unit, held in shapes.units.items() for names, at, made in _placed(held)
        }


def decoder(opened: Opened) -> Decoder:
    """The model in fp32, with tables and two layers in memory."""
    weights = opened.checkpoint.weights(torch.float32)
    shapes, _ = shapes_of(opened.checkpoint, weights, opened.config, None)
    return Decoder(opened.config, _Layerwise(weights, shapes), opened.device)


@torch.inference_mode()
def choices(path: Path, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The token that transformers finds the most probable behind each one, of each text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def value(name: str) -> Tensor:
        stem, _, suffix = name.rpartition(".")
        found = held[f"{names.get_name(stem)}.{suffix}"]
        return torch.from_numpy(gguf.dequantize(found.data, found.tensor_type)).view(*reversed(found.shape.tolist()))

    def filled(module: nn.Module, prefix: str) -> nn.Module:
        module.load_state_dict({key: value(f"{prefix}.{key}") for key in module.state_dict()}, assign=True)
        return module

    longest = max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])  # what is behind is read by none
    hidden = F.embedding(tokens, value("model.embed_tokens.weight"))
    mask = torch.full((longest, longest), -torch.inf).triu(1)[None, None]
    turns = type(model.model.rotary_emb)(config)(hidden, torch.arange(longest)[None])
    for i, layer in enumerate(model.model.layers):
        filled(layer, f"model.layers.{i}")
        hidden = layer(hidden, attention_mask=mask, position_embeddings=turns)
        layer.to("meta")
    hidden = filled(model.model.norm, "model.norm")(hidden)
    head = value("lm_head.weight" if "output.weight" in held else "model.embed_tokens.weight")
    return [(hidden[i, : len(text)] @ head.T).argmax(-1).tolist() for i, text in enumerate(texts)]
