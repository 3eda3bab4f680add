"""A checkpoint's own head for multi-token prediction: one block behind the layers, which drafts.

    x = fc([norm(e(next token)); norm(h)])      h: the target's state after its final norm; of a draft token, what its
    y = block(x),  logits = head(norm(y))          parent's norm(y) is

Takes a checkpoint and its target; gives an `Mtp`. The tensors decide: where a config names a head that the files lack,
there is none. Embedding table and output matrix are the target's. Of several heads (one for each depth, in DeepSeek's
manner) the first one drafts every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.cache.stage import BLOCK
from longspec.errors import ModelError, UsageError
from longspec.heads.draft_vocabulary import rounded
from longspec.heads.format import Trained
from longspec.heads.published.eagle3 import layer_of
from longspec.machine.schema import shown
from longspec.model.config import Config
from longspec.model.decoder import Decoder, Rows
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.layer import shape_of
from longspec.model.layers.norm import Norm
from longspec.model.layers.reader import Reader
from longspec.model.load import CODED, DTYPES, Model
from longspec.model.weights.read import Weights

__all__ = ["SPECULATORS", "Mtp", "check_head", "has_head", "lacking", "load_mtp", "mtp_folder", "mtp_of", "room"]

_NAMED = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
_CODED = 9 / 8  # bytes of a weight in 8 bits, with its group's scale; and more than of one in less

_QWEN = {
    "fc": "mtp.fc",
    "token_norm": "mtp.pre_fc_norm_embedding",
    "state_norm": "mtp.pre_fc_norm_hidden",
    "norm": "mtp.norm",
    "layers.0.": "mtp.layers.0.",
}
_DEEPSEEK = {"fc": "eh_proj", "token_norm": "enorm", "state_norm": "hnorm", "norm": "shared_head.norm", "layers.0.": ""}
"""Names of modules within the block, which counts as a layer behind the last one."""

_OURS = {name: name for name in _QWEN}

SPECULATORS = {
    "fc": "mtp_layers.0.input_proj",
    "token_norm": "mtp_layers.0.token_layernorm",
    "state_norm": "mtp_layers.0.hidden_layernorm",
    "norm": "mtp_layers.0.final_layernorm",
    "layers.0.": "mtp_layers.0.",
}
"""Names of modules in a folder of vLLM's `speculators`."""


@dataclass(frozen=True, slots=True)
class Mtp:
    """A loaded head."""

    decoder: Decoder  # its layer and its norm, with the target's output matrix
    projection: Any  # [width, 2 * width]
    token_norm: Norm
    state_norm: Norm
    tokens: Tensor | None  # [D] int64, rising: the draft vocabulary; None is all tokens
    nbytes: int

    def enter(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Inputs of the layer [r, width], of normed states and the embeddings of the tokens behind them."""
        made: Tensor = self.projection(torch.cat((self.token_norm(embedded), self.state_norm(states)), -1))
        return made

    def follow(self, rows: Rows, x: Tensor) -> Tensor:
        """The layer's outputs [r, width] of each span's last row; the others only leave their keys and values, and
        theirs is 0.
        """
        early, at = rows.part([slice(span.staged.start, span.staged.stop - 1) for span in rows.spans])
        if at:
            self.decoder.fill(early, x[at])
        newest, at = rows.part([slice(span.staged.stop - 1, span.staged.stop) for span in rows.spans])
        made = torch.zeros_like(x)
        made[at] = self.decoder.forward(newest, x[at])
        return made


def load_mtp(model: Model, tokens: Tensor | None = None) -> Mtp:
    """The head of a target's checkpoint, in the target's dtype. tokens: [D] int64, rising: its draft vocabulary, of
    which it has the output matrix's rows a second time; None is all tokens, with the target's own.

    Raises:
        UsageError: the model has none.
        ModelError: its config names one, and the files lack it; or a tensor is missing or of another shape.
    """
    target, checkpoint = model.decoder, model.checkpoint
    if checkpoint is None:
        raise UsageError(f"{model.name} was made of no files, in which an MTP head could lie; use another --drafter.")
    weights = _weights(checkpoint, target.dtype)
    return _made(model, _block(target.config), weights, tokens, _places(checkpoint, weights, target.config))


def mtp_of(model: Model, head: Trained) -> Mtp:
    """A head that was trained here, of the kind `fastmtp`."""
    weights = Weights.of_tensors(head.module.state_dict(), model.decoder.dtype)
    return _made(model, head.config(model), weights, head.tokens, _OURS)


def mtp_folder(folder: Path, raw: Mapping[str, Any], model: Model) -> Mtp:
    """A head in the layout of `speculators`, over a layer of Qwen3's form. raw: the folder's config.json.

    Raises:
        UsageError: the head is for a model of other sizes.
        ModelError: the files are damaged or missing.
    """
    target, layer = model.decoder.config, raw.get("transformer_layer_config") or {}
    if layer.get("model_type") != "qwen3":
        raise UsageError(f"The MTP head in {folder} has a layer of {shown(layer.get('model_type'))}; longspec drafts "
                         "with layers of qwen3's form.")  # fmt: skip
    config = layer_of(raw, target, "qwen3")
    if (config.width, config.vocabulary) != (target.width, target.vocabulary):
        raise UsageError(f"The head in {folder} is {config.width} wide, for {config.vocabulary:,} tokens; {model.name} "
                         f"is {target.width} wide, with {target.vocabulary:,}: take its own.")  # fmt: skip
    weights = Weights.of_folder(folder, model.decoder.dtype)
    return _made(model, config, weights, None, SPECULATORS)


def _made(model: Model, config: Config, weights: Weights, tokens: Tensor | None, places: Mapping[str, str]) -> Mtp:
    target, coded = model.decoder, CODED.get(model.dtype)
    tokens = None if tokens is None else tokens.to(target.device)
    output, rows = target.output_of(tokens), 0
    if tokens is not None:
        config = replace(config, vocabulary=len(tokens))
        rows = sum(piece.tiles.nbytes for piece in output.pieces) if target.coded else output.weight.nbytes
    decoder = Decoder(config, weights, target.device, coded=coded, output=output, places=places)
    # The projection is a small matrix, and stays in the rows' dtype where others are codes.
    reader = Reader(config, weights, target.device, None, None, places)
    return Mtp(
        decoder,
        projection=reader.linear(["fc"], config.width, 2 * config.width),
        token_norm=reader.norm("token_norm", config.width),
        state_norm=reader.norm("state_norm", config.width),
        tokens=tokens,
        nbytes=decoder.nbytes + reader.nbytes + rows,
    )


def has_head(checkpoint: Checkpoint, config: Config) -> bool:
    """Whether the files hold a head; only their headers are read."""
    return _found(_weights(checkpoint), config) is not None


def check_head(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse files without a head, before weights are read. The errors are those of `load_mtp`."""
    _places(checkpoint, _weights(checkpoint), config)


def lacking(checkpoint: Checkpoint, config: Config) -> str | None:
    """What is to be said of files without a head whose config.json names one; None where nothing is."""
    raw = checkpoint.config()
    said = {**(raw.get("text_config") or {}), **raw}
    named = next((name for name in _NAMED if said.get(name)), None)
    if named is None or has_head(checkpoint, config):
        return None
    return f"The config.json of {checkpoint.name} names an MTP head ({named}), and the files hold no tensors of one"


def room(checkpoint: Checkpoint, config: Config, dtype: str, device: torch.device, hot: int = 0) -> tuple[int, int]:
    """Bytes of the head's weights, by the files' headers, and of what a token position takes in its cache. hot: size of
    the draft vocabulary. The errors are those of `load_mtp`.
    """
    weights = _weights(checkpoint)
    places, item = _places(checkpoint, weights, config), DTYPES[dtype].itemsize
    own = [name for name in weights if name.startswith(tuple(places.values()))]
    each = {name: item if dtype not in CODED or name.startswith(places["fc"]) else _CODED for name in own}
    once = sum(int(prod(weights.shape(name)) * size) for name, size in each.items())
    if 0 < rounded(hot) < config.vocabulary:
        once += int(rounded(hot) * config.width * (_CODED if dtype in CODED else item))
    return once + BLOCK * config.width * item, shape_of(_block(config), DTYPES[dtype], device).row_bytes


def _weights(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Weights:
    """The files' tensors, those of a GGUF file from itself: a plan doesn't convert it, and what a pulled one was
    converted to may be older than this reader of its head.
    """
    return checkpoint.weights(dtype, coded=True)


def _block(target: Config) -> Config:
    """Config of the head's layer: like the target's last attention."""
    last = max(i for i, spec in enumerate(target.specs) if spec.is_attention)
    mixture = target.mixture and replace(target.mixture, layers=(target.mixture.layers[last],))
    return replace(
        target,
        windows=(target.windows[last],),
        ropes=(target.ropes[last],),
        mixers=("attention",),
        delta=None,
        mixture=mixture,
    )


def _places(checkpoint: Checkpoint, weights: Weights, config: Config) -> Mapping[str, str]:
    """The head's modules by their names here: what they are called in the files."""
    if (found := _found(weights, config)) is not None:
        return found
    if (lacks := lacking(checkpoint, config)) is not None:
        raise ModelError(f"{lacks}: take a repository that kept them, or another --drafter.")
    raise UsageError(f"{checkpoint.name} has no MTP head; use another --drafter, or a model that has one.")


def _found(weights: Weights, config: Config) -> Mapping[str, str] | None:
    if config.per_layer is not None:  # Gemma 4: no such head exists, and its layers aren't a head's
        return None
    if f"{_QWEN['fc']}.weight" in weights:
        return _QWEN
    for prefix in ("model.", "model.language_model.", "language_model.model.", ""):
        at = f"{prefix}layers.{config.layers}."
        if f"{at}{_DEEPSEEK['fc']}.weight" in weights:
            return {name: f"{at}{module}" for name, module in _DEEPSEEK.items()}
    return None
