"""Published EAGLE-3 heads (2503.01840), in the authors' file layout and in that of `speculators`.

    h = fc([H_low; H_middle; H_high])           of a committed position; of a draft token, its parent's h
    x = [norm(e(next token)); norm(h)],  h <- h + attention(x),  h <- h + mlp(norm(h)),  logits = head(norm(h))

Takes a folder and a target; gives an `Eagle3`, or an error that names the tensor that doesn't fit. These files don't
identify the weights that they were trained for: only sizes are compared with the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.attention import attend
from longspec.cache.stage import Shape
from longspec.errors import ModelError, UsageError
from longspec.heads.eagle3 import Eagle3Head
from longspec.heads.format import Trained
from longspec.machine.schema import listed, shown, whole
from longspec.model.config import Config
from longspec.model.decoder import Rows
from longspec.model.load import Model
from longspec.model.rope import Rotation, rotate
from longspec.model.weights.read import check_values
from longspec.model.weights.safetensors import Shard

__all__ = ["Eagle3", "draft_tokens", "eagle3_of", "layer_of", "load_eagle3"]

_DEPTH = 7  # default draft depth, as in EAGLE-2's and EAGLE-3's code
_MOST_DEPTH = _MOST_LAYERS = 64
_READ = (  # what of a config its one layer is made of
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
)


@dataclass(frozen=True, slots=True)
class Eagle3:
    """A head's weights, in the target's dtype, named as in the authors' files without `midlayer.`."""

    config: Config  # of its layer
    weights: Mapping[str, Tensor]
    layers: tuple[int, ...]  # numbers of target layers after which hidden states are taken
    depth: int  # depth limit of a draft
    tokens: Tensor | None  # [D] int64, ascending: the draft vocabulary in the target's ids; None is all tokens
    embedding: Tensor | None  # [V, width]; None is the target's
    norm_first: bool  # the residual connection around attention takes the normed hidden state
    rotation: Rotation

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, including the head's own embedding."""
        return sum(tensor.nbytes for tensor in (*self.weights.values(), self.embedding) if tensor is not None)

    def shape(self, device: torch.device, dtype: torch.dtype) -> Shape:
        """Shape of the head's KV cache; its window is the context that the head was trained with."""
        return Shape(self.config.key_heads, self.config.head_dim, (self.config.context,), dtype, device)

    def enter(self, features: Tensor) -> Tensor:
        """Input features [r, W] from the target's hidden states [r, layers * width]."""
        return F.linear(features, self.weights["fc.weight"], self.weights.get("fc.bias"))

    def run(self, rows: Rows, hidden: Tensor, embedded: Tensor) -> Tensor:
        """The layer's output [r, W]; puts the rows' keys and values into their stages."""
        c = self.config
        normed = self._norm("hidden_norm", hidden)
        x = torch.cat((self._norm("input_layernorm", embedded), normed), -1)
        queries, keys, values = (self._linear(f"self_attn.{n}_proj", x).view(len(x), -1, c.head_dim) for n in "qkv")
        turn = self.rotation(rows.positions, rows.long, x.dtype)
        queries, keys = rotate(queries, *turn), rotate(keys, *turn)
        outputs = []
        for span in rows.spans:
            span.stage.put(0, span.staged, keys[span.at], values[span.at])
            own = queries[span.at]
            outputs.append(attend(own, span.stage.parts(0, span.staged, own), c.scale))
        hidden = normed if self.norm_first else hidden
        hidden = hidden + self._linear("self_attn.o_proj", torch.cat(outputs).flatten(1))
        x = self._norm("post_attention_layernorm", hidden)
        gated = F.silu(self._linear("mlp.gate_proj", x)) * self._linear("mlp.up_proj", x)
        return hidden + self._linear("mlp.down_proj", gated)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [r, D] over the draft vocabulary."""
        return F.linear(self._norm("norm", hidden), self.weights["lm_head.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[f"{name}.weight"], self.config.eps)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))


def eagle3_of(model: Model, head: Trained) -> Eagle3:
    """A head that was trained here, of the kind `eagle3`. Its cache's window is that of its training."""
    module, dtype, config = head.module, model.decoder.dtype, head.config(model)
    assert isinstance(module, Eagle3Head)
    weights = {_plain(name): value.to(dtype) for name, value in module.state_dict().items() if name != "scale"}
    weights |= {"fc.weight": module.folded.detach().to(dtype), "lm_head.weight": head.rows(model)}
    rope = config.ropes[0]
    assert rope is not None
    return Eagle3(
        replace(config, context=head.window),
        weights,
        head.reads(model),
        head.depth,
        None if head.tokens is None else head.tokens.to(model.decoder.device),
        None,
        True,
        Rotation(rope, model.decoder.device),
    )


def load_eagle3(folder: Path, raw: Mapping[str, Any], model: Model) -> Eagle3:
    """Load a head from a folder's model.safetensors. raw: the parsed config.json.

    Raises:
        UsageError: the head is for a model of other sizes.
        ModelError: the files are damaged or missing, or pickled.
    """
    path, target = folder / "model.safetensors", model.decoder.config
    config = layer_of(raw, target, "llama")
    if config.vocabulary != target.vocabulary:
        raise UsageError(f"The head in {folder} is for a vocabulary of {config.vocabulary:,} tokens; {model.name} has "
                         f"{target.vocabulary:,}: take the model that it was trained for.")  # fmt: skip
    if not path.is_file():
        raise ModelError(f"{folder} holds no model.safetensors; longspec reads no pickled weights: convert them first.")
    shard = Shard(path)
    held = {_plain(name): shard.take(name) for name in shard.names}
    layers = raw.get("eagle_aux_hidden_state_layer_ids") or [2, target.layers // 2, target.layers - 3]
    if not listed(whole(1, target.layers), 64).holds(layers):
        raise UsageError(f"The head in {folder} reads the layers {shown(layers)}; {model.name} has {target.layers}.")
    tokens, order = draft_tokens(path, held.get("d2t"), target.vocabulary)
    size = target.vocabulary if tokens is None else len(tokens)
    wanted = _shapes(config, len(layers) * target.width, size)
    for name, shape in wanted.items():
        seen = tuple(held[name].shape) if name in held else None
        if seen != shape:
            raise UsageError(
                f"The head in {folder} doesn't fit {model.name}: its {name} is {list(seen) if seen else 'missing'}, "
                f"expected {list(shape)}; take the model that it was trained for."
            )
    device, dtype = model.decoder.device, model.decoder.dtype
    weights = {name: _values(name, held[name]).to(device, dtype) for name in held if name not in ("d2t", "t2d")}
    embedding = weights.pop("embed_tokens.weight", None)
    if order is not None:
        weights["lm_head.weight"] = weights["lm_head.weight"][order.to(device)]
    if embedding is not None and tuple(embedding.shape) != (target.vocabulary, config.width):
        raise ModelError(f"{path} is damaged: embed_tokens.weight is {list(embedding.shape)}.")
    rope = config.ropes[0]
    assert rope is not None
    return Eagle3(
        replace(config, context=min(config.windows[0] or config.context, config.context, target.context)),
        weights,
        tuple(layers),
        _depth(raw),
        None if tokens is None else tokens.to(device),
        embedding,
        bool(raw.get("norm_before_residual", False)),
        Rotation(rope, device),
    )


def draft_tokens(path: Path, offsets: Tensor | None, vocabulary: int) -> tuple[Tensor | None, Tensor | None]:
    """[D] int64, rising: the target's tokens that a file's d2t names, and the order of the file's rows that this is.
    None and None where it has no d2t.

    Raises:
        ModelError: it names others, or one twice.
    """
    if offsets is None:
        return None, None
    if offsets.ndim != 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ModelError(
            f"{path} is damaged: d2t is {list(offsets.shape)} of {offsets.dtype}, and should be a row of int64."
        )
    size = len(offsets)
    tokens = offsets.long() + torch.arange(size)
    if not size or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary or len(set(tokens.tolist())) < size:
        raise ModelError(f"{path} is damaged: d2t must name {size:,} of the target's tokens, each once.")
    sorted_tokens, order = tokens.sort()
    return sorted_tokens, order


def layer_of(raw: Mapping[str, Any], target: Config, family: str, *, layers: bool = False) -> Config:
    """Config of a head's layer, of a family's form, with its window; of all of its layers, if these are asked for. raw:
    of the head's folder.

    Raises:
        ModelError: a value isn't what it must be.
    """
    layer = raw.get("transformer_layer_config") or raw
    read = {name: layer[name] for name in _READ if name in layer}
    count = layer.get("num_hidden_layers") if layers else 1
    if not whole(1, _MOST_LAYERS).holds(count):
        raise ModelError(f"The head's config.json says {shown(count)} layers; 1 to {_MOST_LAYERS} were expected.")
    config = Config.read({"vocab_size": target.vocabulary, **read, "model_type": family, "num_hidden_layers": count})
    kinds, window = [*(layer.get("layer_types") or ())], layer.get("sliding_window")
    slides = ["sliding_attention" in kinds[i : i + 1] for i in range(int(count or 1))]
    if any(slides) and not (window is None or whole(1, 1 << 31).holds(window)):
        raise ModelError(f"The head's config.json says a sliding_window of {shown(window)}; positions were expected.")
    return replace(config, windows=tuple(window if each else None for each in slides))


def _plain(name: str) -> str:
    """A tensor's name without the layer's prefix, which differs between `speculators` and the authors' files."""
    return name.removeprefix("midlayer.").removeprefix("layers.0.")


def _values(name: str, tensor: Tensor) -> Tensor:
    check_values([name], [tensor.dtype], [])
    return tensor


def _depth(raw: Mapping[str, Any]) -> int:
    try:
        depth = raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        return _DEPTH
    return depth if type(depth) is int and 1 <= depth <= _MOST_DEPTH else _DEPTH


def _shapes(c: Config, read: int, size: int) -> dict[str, tuple[int, ...]]:
    inner, outer = c.heads * c.head_dim, c.key_heads * c.head_dim
    return {
        "fc.weight": (c.width, read),
        "hidden_norm.weight": (c.width,),
        "input_layernorm.weight": (c.width,),
        "self_attn.q_proj.weight": (inner, 2 * c.width),
        "self_attn.k_proj.weight": (outer, 2 * c.width),
        "self_attn.v_proj.weight": (outer, 2 * c.width),
        "self_attn.o_proj.weight": (c.width, inner),
        "post_attention_layernorm.weight": (c.width,),
        "mlp.gate_proj.weight": (c.mlp_width, c.width),
        "mlp.up_proj.weight": (c.mlp_width, c.width),
        "mlp.down_proj.weight": (c.width, c.mlp_width),
        "norm.weight": (c.width,),
        "lm_head.weight": (size, c.width),
    }
