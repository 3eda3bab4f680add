"""Gemma 4's assistant: a head of a few layers that have queries only, and read two layers of the target's cache.

Takes a folder of transformers' `gemma4_assistant` and the target; gives states and logits. A row's input is the token's
embedding beside a state, both as wide as the target; its output, projected to that width, is the state that the next
row takes. All rows of a draft stand at one position, that of the text's last token, and read the rows before it: its
local layers those of the target's last local layer with keys of its own, its global ones those of the last global one.

    x = P [e; s],   h = layers(x),   logits = E n(h),   s' = P' n(h)

The logits may be of a few clusters of tokens only: those whose centroids are nearest to n(h).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.errors import ModelError, UsageError
from longspec.model.config import Config
from longspec.model.load import Model
from longspec.model.rope import Rotation, rotate
from longspec.model.weights.read import Weights

__all__ = ["MODEL_TYPES", "Assistant", "load_assistant"]

MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
"""By which a folder's config.json is known."""

Read = Callable[[int, Tensor], Tensor]
"""Attention's output [r, H, D] of a place in the target's cache and queries [r, H, D]."""


@dataclass(frozen=True, slots=True)
class Assistant:
    """A head's weights, in the target's dtype, under their names without `model.`."""

    config: Config
    weights: Mapping[str, Tensor]
    places: Sequence[int]  # of each layer, in the target's cache
    rotations: Sequence[Rotation]
    clusters: Tensor | None  # [c, n] int64: the tokens of each cluster; None: one product with all tokens
    nearest: int  # clusters that have logits

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weights.values())

    def run(self, embedded: Tensor, states: Tensor, positions: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        """Normed outputs [r, w], and the states [r, width] of the rows behind, of embeddings and states [r, width]."""
        x = self._product("pre_projection", torch.cat((embedded, states), -1))
        short = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i, place in enumerate(self.places):
            x = self._layer(i, place, x, self.rotations[i](positions, short, x.dtype), read)
        made = self._norm("norm", x)
        return made, self._product("post_projection", made)

    def logits(self, made: Tensor) -> Tensor:
        """[r, V] of normed outputs [r, w]. Of clusters that aren't near, what is below the rest."""
        table = self.weights["embed_tokens.weight"]
        if self.clusters is None:
            return F.linear(made, table)
        near = self._product("masked_embedding.centroids", made).topk(self.nearest, -1).indices
        tokens = self.clusters[near].flatten(1)  # [r, nearest * n]
        found = torch.einsum("rw,rnw->rn", made, table[tokens])
        logits = (found.amin(-1, keepdim=True) - 1).expand(-1, len(table)).clone()
        return logits.scatter_(-1, tokens, found)

    def _layer(self, i: int, place: int, x: Tensor, turn: tuple[Tensor, Tensor], read: Read) -> Tensor:
        at, c = f"layers.{i}", self.config
        assert c.per_layer is not None
        queries = self._product(f"{at}.self_attn.q_proj", self._norm(f"{at}.input_layernorm", x))
        queries = self._norm(f"{at}.self_attn.q_norm", queries.view(len(x), c.heads, c.per_layer.heads[i][1]))
        read_rows = read(place, rotate(queries, *turn)).flatten(1)
        x = x + self._norm(f"{at}.post_attention_layernorm", self._product(f"{at}.self_attn.o_proj", read_rows))
        normed = self._norm(f"{at}.pre_feedforward_layernorm", x)
        gated = F.gelu(self._product(f"{at}.mlp.gate_proj", normed), approximate="tanh")
        made = self._product(f"{at}.mlp.down_proj", gated * self._product(f"{at}.mlp.up_proj", normed))
        x = x + self._norm(f"{at}.post_feedforward_layernorm", made)
        return x * self.weights[f"{at}.layer_scalar"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.config.eps).to(x.dtype)

    def _product(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])


def load_assistant(folder: Path, raw: Mapping[str, Any], model: Model) -> Assistant:
    """Load a head from a folder's safetensors files. raw: its config.json.

    Raises:
        UsageError: it is for a target of other sizes, or the target is no Gemma 4.
        ModelError: the files are damaged or missing, or the config can't be used.
    """
    target, text = model.decoder.config, raw.get("text_config")
    if target.per_layer is None:
        raise UsageError(f"The head in {folder} reads a Gemma 4's cache, and {model.name} is a {target.family}.")
    if not isinstance(text, Mapping):
        raise ModelError(f"{folder}: its config.json has no text_config, where its layers' sizes should stand.")
    # All its layers share the target's keys; as a config of its own it is read as if they had some.
    plain = {**text, "model_type": "gemma4_text", "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    config = Config.read({"attention_k_eq_v": False, **plain})
    held = Weights.of_folder(folder, model.decoder.dtype)
    device = model.decoder.device
    shapes = _shapes(config, target.width)
    ordered = bool(raw.get("use_ordered_embeddings"))
    if ordered:
        shapes["masked_embedding.centroids.weight"] = (_size(raw, "num_centroids", 2048), config.width)
    weights = {}
    for name, shape in shapes.items():
        stored = next((each for each in (f"model.{name}", name) if each in held), None)
        seen = None if stored is None else held.shape(stored)
        if stored is None or seen != shape:
            found = "missing" if seen is None else list(seen)
            raise UsageError(
                f"The head in {folder} doesn't fit {model.name}: its {name} is {found}, expected {list(shape)}; take "
                "the model that it was trained for."
            )
        weights[name] = held[stored].to(device)
    return Assistant(
        config,
        weights,
        _places(folder, config, target),
        [Rotation(rope, device) for rope in config.ropes if rope is not None],
        _clusters(folder, held, config, len(weights["masked_embedding.centroids.weight"])).to(device)
        if ordered
        else None,
        min(_size(raw, "centroid_intermediate_top_k", 32), _size(raw, "num_centroids", 2048)),
    )


def _size(raw: Mapping[str, Any], name: str, default: int) -> int:
    value = raw.get(name, default)
    if type(value) is not int or not 1 <= value <= 1 << 24:
        raise ModelError(f"The assistant's config.json says {value!r} in {name}, where a size was expected.")
    return value


def _places(folder: Path, config: Config, target: Config) -> list[int]:
    """Of each layer, where the target's cache has the keys and values that it reads."""
    own, theirs = config.per_layer, target.per_layer
    assert own is not None
    assert theirs is not None
    if config.vocabulary != target.vocabulary:
        raise UsageError(f"The head in {folder} has {config.vocabulary:,} tokens, and the model {target.vocabulary:,}.")
    places = []
    for i, window in enumerate(config.windows):
        alike = [at for at, j in enumerate(theirs.owners) if (target.windows[j] is None) == (window is None)]
        layer = theirs.owners[alike[-1]] if alike else None
        if layer is None or theirs.heads[layer][1] != own.heads[i][1] or config.heads % theirs.heads[layer][0]:
            raise UsageError(
                f"The head in {folder} reads heads of {own.heads[i][1]} channels in its layer {i}, which the model's "
                "cache doesn't have; take the model that it was trained for."
            )
        places.append(alike[-1])
    return places


def _clusters(folder: Path, held: Weights, config: Config, count: int) -> Tensor:
    name = "masked_embedding.token_ordering"
    order = held[name].long() if name in held else torch.empty(0, dtype=torch.int64)
    if config.vocabulary % count or not torch.equal(order.sort().values, torch.arange(config.vocabulary)):
        raise ModelError(
            f"{folder}: {name} should name each of {config.vocabulary:,} tokens once, in {count:,} clusters."
        )
    return order.view(count, -1)


def _shapes(c: Config, width: int) -> dict[str, tuple[int, ...]]:
    """Of the weights, for a target of this width."""
    assert c.per_layer is not None
    shapes: dict[str, tuple[int, ...]] = {
        "pre_projection.weight": (c.width, 2 * width),
        "post_projection.weight": (width, c.width),
        "norm.weight": (c.width,),
        "embed_tokens.weight": (c.vocabulary, c.width),
    }
    for i, (_, dim) in enumerate(c.per_layer.heads):
        at, channels = f"layers.{i}", c.per_layer.channels[i]
        norms = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        shapes |= {f"{at}.{norm}.weight": (c.width,) for norm in norms}
        shapes |= {
            f"{at}.layer_scalar": (1,),
            f"{at}.self_attn.q_norm.weight": (dim,),
            f"{at}.self_attn.q_proj.weight": (c.heads * dim, c.width),
            f"{at}.self_attn.o_proj.weight": (c.width, c.heads * dim),
            f"{at}.mlp.gate_proj.weight": (channels, c.width),
            f"{at}.mlp.up_proj.weight": (channels, c.width),
            f"{at}.mlp.down_proj.weight": (c.width, channels),
        }
    return shapes
