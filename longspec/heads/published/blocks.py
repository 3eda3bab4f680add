"""Block drafters, DFlash (2602.06036) and DSpark (2607.05147), in the layout of `speculators`.

Layers of Qwen3's form over a block: the text's last token, then masks. Their keys and values are the block's own and,
before them, those of the text, which come from the target: one product for each committed position, the same in every
layer.

    c = norm(fc [H_a; H_b; ...])                of a committed position, layers a, b, ... of the target
    q = Q x,  k = K [c; x],  v = V [c; x]       of the block's rows x: in full attention each reads the whole block
    logits of the block's place i  =  head(norm(x_i))  (+ W2 f(W1 e(token before it)),  DSpark's bias)

DSpark's f is the identity, a gate, or a recurrence along the path: the tensors decide. Its head of confidence is passed
over, since control calibrates what a tree's own chances are worth. Takes a folder and a target; gives `Blocks`. These
files don't identify the weights that they were trained for: only sizes are compared with the target's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.attention import attend
from longspec.cache.stage import Bounds, Segment, Shape
from longspec.errors import ModelError, UsageError
from longspec.heads.published.eagle3 import draft_tokens, layer_of
from longspec.machine.schema import listed, shown, whole
from longspec.model.config import Config
from longspec.model.decoder import Rows
from longspec.model.load import Model
from longspec.model.rope import Rotation, rotate
from longspec.model.weights.read import check_values
from longspec.model.weights.safetensors import Shard

__all__ = ["MODEL_TYPES", "Blocks", "load_blocks"]

MODEL_TYPES = ("dflash", "dspark")
"""Values of `speculators_model_type`."""

_MOST_BLOCK = 65  # places: as many tokens as a draft may have, behind the last one of the text
_W1, _W2 = "markov_head.markov_w1", "markov_head.markov_w2"
_GATE, _JOINT = "markov_head.gate_proj", "markov_head.joint_proj"


@dataclass(frozen=True, slots=True)
class Blocks:
    """A drafter's weights, in the target's dtype, under the names of its file."""

    config: Config  # of its layers
    weights: Mapping[str, Tensor]
    layers: tuple[int, ...]  # numbers of target layers after which hidden states are taken
    size: int  # places of a block
    first: int  # the place of the first drafted token
    mask: int  # the token that stands in all places but the first
    is_mutual: bool  # a block's rows read each other in layers with a window too
    tokens: Tensor | None  # [D] int64, rising: the draft vocabulary; None is all tokens
    head: Tensor  # [D, width]
    embedding: Tensor | None  # [V, width]; None is the target's
    rotation: Rotation

    @property
    def depth(self) -> int:
        """Tokens of a draft, one behind the other."""
        return self.size - self.first

    @property
    def nbytes(self) -> int:
        held = (*self.weights.values(), self.embedding, None if self.tokens is None else self.head)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def shape(self, device: torch.device, dtype: torch.dtype) -> Shape:
        """Shape of the cache of its layers."""
        c = self.config
        return Shape(c.key_heads, c.head_dim, (None,) * c.layers, dtype, device)

    def fill(self, rows: Rows, features: Tensor) -> Tensor:
        """Put keys and values of committed positions into their stages, of the target's states [r, layers * width];
        gives what they are made of [r, width].
        """
        made = self._norm("hidden_norm", self._linear("fc", features))
        turn = self.rotation(rows.positions, rows.long, made.dtype)
        for layer in range(self.config.layers):
            keys, values = self._keys(layer, made, turn)
            for span in rows.spans:
                span.stage.put(layer, span.staged, keys[span.at], values[span.at])
        return made

    def outputs(self, embedded: Tensor, text: Sequence[Tensor], position: int) -> Tensor:
        """Normed outputs [size, width] of a block's embeddings. text: of each layer the keys and values [2, K, n, D] of
        the positions before it. position: of the block's first place.
        """
        x, c = embedded, self.config
        positions = torch.arange(position, position + len(x), device=x.device)
        turn = self.rotation(positions, torch.zeros(len(x), dtype=torch.bool, device=x.device), x.dtype)
        upwards = Bounds(torch.zeros_like(positions), torch.arange(1, len(x) + 1, device=x.device))
        for layer, window in enumerate(c.windows):
            at = f"layers.{layer}"
            normed = self._norm(f"{at}.input_layernorm", x)
            queries = self._linear(f"{at}.self_attn.q_proj", normed).view(len(x), c.heads, c.head_dim)
            queries = rotate(self._norm(f"{at}.self_attn.q_norm", queries), *turn)
            own = [each.transpose(0, 1).contiguous() for each in self._keys(layer, normed, turn)]
            keys, values = text[layer] if window is None else text[layer][:, :, -window:]
            parts = [Segment.dense(keys, values)] if keys.shape[1] else []
            parts.append(Segment.dense(own[0], own[1], None if window is None or self.is_mutual else upwards))
            x = x + self._linear(f"{at}.self_attn.o_proj", attend(queries, parts, c.scale).flatten(1))
            normed = self._norm(f"{at}.post_attention_layernorm", x)
            gated = F.silu(self._linear(f"{at}.mlp.gate_proj", normed)) * self._linear(f"{at}.mlp.up_proj", normed)
            x = x + self._linear(f"{at}.mlp.down_proj", gated)
        return self._norm("norm", x)

    def bias(self, tokens: Tensor, outputs: Tensor, states: Tensor) -> tuple[Tensor | None, Tensor]:
        """DSpark's bias [r, D] behind these tokens [r], and the states behind them. outputs: [r, width], of the places
        that they are drafted from. states: [r, rank], of their parents. None where there is none.
        """
        if f"{_W1}.weight" not in self.weights:
            return None, states
        before = F.embedding(tokens, self.weights[f"{_W1}.weight"])
        if f"{_JOINT}.weight" in self.weights:
            gate, new, out = self._linear(_JOINT, torch.cat((states, before, outputs), -1)).chunk(3, -1)
            gate = torch.sigmoid(gate)
            states, before = gate * states + (1 - gate) * torch.tanh(new), torch.tanh(out)
        elif f"{_GATE}.weight" in self.weights:
            before = torch.sigmoid(self._linear(_GATE, torch.cat((outputs, before), -1))) * before
        return self._linear(_W2, before), states

    @property
    def rank(self) -> int:
        """Of DSpark's bias; 0 where there is none."""
        return self.weights[f"{_W1}.weight"].shape[1] if f"{_W1}.weight" in self.weights else 0

    def _keys(self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [r, K, D]."""
        at, c = f"layers.{layer}.self_attn", self.config
        keys, values = (self._linear(f"{at}.{name}_proj", x).view(len(x), c.key_heads, c.head_dim) for name in "kv")
        return rotate(self._norm(f"{at}.k_norm", keys), *turn), values

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[f"{name}.weight"], self.config.eps)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))


def load_blocks(folder: Path, raw: Mapping[str, Any], model: Model) -> Blocks:
    """Load a drafter from a folder's model.safetensors. raw: the parsed config.json.

    Raises:
        UsageError: it is for a model of other sizes.
        ModelError: the files are damaged or missing, or pickled.
    """
    path, target, device = folder / "model.safetensors", model.decoder.config, model.decoder.device
    if not path.is_file():
        raise ModelError(f"{folder} holds no model.safetensors; longspec reads no pickled weights: convert them first.")
    config = layer_of(raw, target, "qwen3", layers=True)
    if (config.width, config.vocabulary) != (target.width, target.vocabulary):
        raise UsageError(f"The drafter in {folder} is {config.width} wide, for {config.vocabulary:,} tokens; "
                         f"{model.name} is {target.width} wide, with {target.vocabulary:,}: take its own.")  # fmt: skip
    layers, size, mask = (raw.get(name) for name in ("aux_hidden_state_layer_ids", "block_size", "mask_token_id"))
    if not (listed(whole(1, target.layers), 64).holds(layers) and layers):
        raise UsageError(f"The drafter in {folder} reads the layers {shown(layers)}; {model.name} has {target.layers}.")
    first = 0 if raw.get("sample_from_anchor", raw.get("speculators_model_type") == "dspark") else 1
    fits = whole(1 + first, _MOST_BLOCK).holds(size) and whole(0, target.vocabulary - 1).holds(mask)
    if not (fits and isinstance(size, int) and isinstance(mask, int)):
        raise ModelError(f"The config.json of {folder} says a block_size of {shown(size)} and a mask_token_id of "
                         f"{shown(mask)}; {1 + first} to {_MOST_BLOCK} and one of the target's tokens were "
                         "expected.")  # fmt: skip
    shard = Shard(path)
    held = {name: shard.take(name) for name in shard.names if name not in ("d2t", "t2d")}
    tokens, order = draft_tokens(path, shard.take("d2t") if "d2t" in shard.names else None, target.vocabulary)
    count = target.vocabulary if tokens is None else len(tokens)
    weights = {}
    for name, shape in _shapes(config, len(layers) * target.width, count, held).items():
        if name not in held or tuple(held[name].shape) != shape:
            seen = list(held[name].shape) if name in held else "missing"
            raise UsageError(f"The drafter in {folder} doesn't fit {model.name}: its {name} is {seen}, expected "
                             f"{list(shape)}; take the model that it was trained for.")  # fmt: skip
        check_values([name], [held[name].dtype], [])
        weights[name] = held[name].to(device, model.decoder.dtype)
    for name in (f"{_W2}.weight", "lm_head.weight"):
        if order is not None and name in weights:
            weights[name] = weights[name][order.to(device)]
    head, embedding = weights.pop("lm_head.weight", None), weights.pop("embed_tokens.weight", None)
    if head is None:
        head = model.decoder.head if tokens is None else model.decoder.head[tokens.to(device)]
    rope = config.ropes[0]
    assert rope is not None
    return Blocks(
        config, weights, tuple(layers), size, first, mask, bool(raw.get("sliding_window_non_causal", False)),
        None if tokens is None else tokens.to(device), head, embedding, Rotation(rope, device),
    )  # fmt: skip


def _shapes(c: Config, read: int, size: int, held: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors that there must be; of those that there may be, the ones that there are."""
    inner, outer, width = c.heads * c.head_dim, c.key_heads * c.head_dim, c.width
    made: dict[str, tuple[int, ...]] = {"fc.weight": (width, read), "hidden_norm.weight": (width,)}
    made["norm.weight"] = (width,)
    may: dict[str, tuple[int, ...]] = {"lm_head.weight": (size, width), "embed_tokens.weight": (c.vocabulary, width)}
    for layer in range(c.layers):
        at = f"layers.{layer}"
        made |= {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        made |= {f"{at}.self_attn.{name}_norm.weight": (c.head_dim,) for name in "qk"}
        products = {"q": (inner, width), "k": (outer, width), "v": (outer, width), "o": (width, inner)}
        made |= {f"{at}.self_attn.{name}_proj.weight": shape for name, shape in products.items()}
        may |= {f"{at}.self_attn.{name}_proj.bias": shape[:1] for name, shape in products.items()}
        made |= {f"{at}.mlp.{name}_proj.weight": (c.mlp_width, width) for name in ("gate", "up")}
        made[f"{at}.mlp.down_proj.weight"] = (width, c.mlp_width)
    if f"{_W1}.weight" in held:
        rank = held[f"{_W1}.weight"].shape[-1]
        made |= {f"{_W1}.weight": (c.vocabulary, rank), f"{_W2}.weight": (size, rank)}
        may |= {f"{_GATE}.weight": (rank, width + rank), f"{_GATE}.bias": (rank,)}
        may |= {f"{_JOINT}.weight": (3 * rank, 2 * rank + width), f"{_JOINT}.bias": (3 * rank,)}
    return {**made, **{name: shape for name, shape in may.items() if name in held}}
