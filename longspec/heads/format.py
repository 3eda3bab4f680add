"""Files of a trained head, in the layout of vLLM's `speculators`: `config.json` and `model.safetensors`.

Takes a folder; gives a `Trained` head for a loaded target, or refuses one that was trained for another. Files aren't
trusted: sizes are bounded, and every tensor's shape is compared with the target's. Fields that the layout lacks (the
target's fingerprint, the attention window, the storage format) stand under `longspec`.

Matrices may be stored as int8 with a scale per row, a quarter of fp32; they are loaded as floats.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.errors import ModelError, UsageError
from longspec.heads import KINDS
from longspec.heads.head import Head
from longspec.heads.layers import block_of
from longspec.heads.recurrent import Recurrent
from longspec.machine.files import read_json
from longspec.machine.schema import TABLE, TEXT, check, listed, shown, whole
from longspec.model.config import Config
from longspec.model.load import Model
from longspec.model.weights.read import check_values
from longspec.model.weights.safetensors import Shard, save_described

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Trained",
    "fitting",
    "is_head",
    "load_head",
    "new_head",
    "read_about",
    "read_config",
    "room",
    "save_head",
    "shipped",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).with_name("shipped")
MOST_DEPTH, MOST_WINDOW = 64, 1 << 20

_VERSION = 1
_LAYOUT = "0.1.0"  # of `speculators`
_MOST_NBYTES = 64 << 10  # of the config
_NAMES = {
    "architectures": listed(TEXT, 64),
    "speculators_model_type": TEXT,
    "transformer_layer_config": TABLE,
    "longspec": TABLE,
}
_SIZES = {"depth": whole(1, MOST_DEPTH), "window": whole(1, MOST_WINDOW), "draft_vocabulary": whole(1, 1 << 31)}
_READS = listed(whole(0, 1 << 16), 64)
_SCALE = ".scale"
_OFFSETS, _DRAFTED = "d2t", "t2d"  # [D] target id - draft id; [V] bool, True for tokens of the draft vocabulary


@dataclass(frozen=True, slots=True)
class Trained:
    """A head with its training parameters."""

    kind: str  # a key of KINDS
    depth: int  # depth limit of a draft, in tokens
    window: int  # attention window of its layers, in positions
    tokens: Tensor | None  # [D] int64, ascending: the draft vocabulary in the target's ids; None is all tokens
    module: Head

    def rows(self, model: Model) -> Tensor:
        """[D, width]: the rows of the target's LM head for the draft vocabulary."""
        head = model.decoder.head
        return head if self.tokens is None else head[self.tokens.to(head.device)]

    def reads(self, model: Model) -> tuple[int, ...]:
        """The target's layers whose hidden states it reads."""
        return self.module.reads or (model.decoder.config.layers,)

    def config(self, model: Model) -> Config:
        """Config of the head's layers."""
        target = model.decoder.config
        size = target.vocabulary if self.tokens is None else len(self.tokens)
        return self.module.block(block_of(target, self.module.LAYERS, self.window, size))


def new_head(
    kind: str,
    model: Model,
    *,
    depth: int = 5,
    window: int = 512,
    tokens: Tensor | None = None,
    seed: int = 0,
    reads: Sequence[int] | None = None,
) -> Trained:
    """An untrained head, whose final norm is a copy of the target's. reads: the layers that it reads, rather than those
    that its kind wants.

    Raises:
        UsageError: an unknown kind, or a depth or window out of range.
    """
    if kind not in KINDS:
        raise UsageError(f"There is no head named {kind!r}; use one of: {', '.join(KINDS)}.")
    if not 1 <= depth <= MOST_DEPTH or not 1 <= window <= MOST_WINDOW:
        raise UsageError(f"A head of depth {depth} and window {window} can't be made; at most {MOST_DEPTH} and "
                         f"{MOST_WINDOW:,} are possible.")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reads = KINDS[kind].reads_of(model.decoder.config.layers) if reads is None else reads
        module = _module(kind, model, window, reads, depth)
    with torch.no_grad():
        module.take(_final_norm(model))
    return Trained(kind, depth, window, tokens, module.to(model.decoder.device))


def _module(kind: str, model: Model, window: int, reads: Sequence[int], depth: int) -> Head:
    block = KINDS[kind].block(block_of(model.decoder.config, KINDS[kind].LAYERS, window, 1))
    return KINDS[kind](block, reads, depth)


def is_head(name: str) -> bool:
    """True if a drafter's name is a path (has a slash) or a folder with a head's config."""
    found = os.path.join(name, CONFIG)  # of any text that somebody asks for, which may be no path
    return name not in KINDS and (os.sep in name or os.path.isfile(found))


def shipped(model: Model) -> dict[str, Path]:
    """The heads that ship with longspec for this model's weights: folders by kind."""
    found = {}
    for config in sorted(SHIPPED.glob(f"*/{CONFIG}")):
        about = read_about(config.parent)
        if about["target"]["lineage"] == model.lineage:
            found[str(about["kind"])] = config.parent
    return found


def fitting(config: Config) -> list[Path]:
    """Folders of the shipped heads for models with this width and vocabulary size, whatever their weights."""
    sizes = {"hidden_size": config.width, "vocab_size": config.vocabulary}
    return [
        path.parent
        for path in sorted(SHIPPED.glob(f"*/{CONFIG}"))
        if sizes.items() <= read_config(path.parent).get("transformer_layer_config", {}).items()
    ]


def room(folder: Path, config: Config) -> tuple[int, int]:
    """Memory of a head in bf16 on a CPU: bytes once, and bytes per token position in its KV cache.

    Counted once: the weights in bf16, as int8 codes, and their working copy while loading; the rows of the LM head in
    bf16 and as codes; and three precomputed tables of the draft tokens.
    """
    about = read_about(folder)
    stored = (folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).is_file() else 0
    int8 = read_config(folder)["longspec"].get("storage") == "int8"
    parameters, rows = stored if int8 else stored // 4, about["draft_vocabulary"] * config.width
    return 6 * parameters + (3 + 3 * 2) * rows, KINDS[about["kind"]].LAYERS * 2 * 2 * config.key_heads * config.head_dim


def weights_bytes(folder: str | Path, dtype: str) -> int:
    """Bytes of a published head's weights in this dtype, assuming that its files are in half precision."""
    stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return 2 * stored if dtype == "fp32" else stored


def save_head(folder: str | Path, head: Trained, model: Model, *, int8: bool = False) -> None:
    """Write a head's files, each atomically, the config last.

    Raises:
        LongspecError: the files can't be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in sorted(head.module.state_dict().items()):
        held = value.detach().cpu().contiguous()
        if int8 and held.dim() == 2:
            tensors |= dict(zip((name, name + _SCALE), _coded(held), strict=True))
        else:
            tensors[name] = held
    if head.tokens is not None:
        tokens = head.tokens.cpu()
        tensors[_OFFSETS] = tokens - torch.arange(len(tokens))
        tensors[_DRAFTED] = torch.zeros(model.decoder.config.vocabulary, dtype=torch.bool).index_fill(0, tokens, True)
    folder = Path(folder)
    save_described(folder / WEIGHTS, tensors, folder / CONFIG, _about(head, model, int8=int8))


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read a folder's config.json, of any head format, by whose names a format is known.

    Raises:
        UsageError: the file is missing, too large or no JSON object, or a name in it is none.
    """
    path = Path(folder) / CONFIG
    found = read_json(path, _MOST_NBYTES, "The head's config", hint="`longspec train` writes one")
    check(f"The head's config {path}", found, _NAMES, UsageError)
    return found


def read_about(folder: str | Path) -> dict[str, Any]:
    """The checked fields of the config of a head written by longspec: kind, depth, window, draft_vocabulary, target.

    Raises:
        UsageError: the config is missing, damaged or not written by this longspec.
    """
    path, found = Path(folder) / CONFIG, read_config(folder)
    own = found.get("longspec") or {}
    if own.get("version") != _VERSION:
        raise UsageError(f"{path} is no head that this longspec knows; `longspec train` writes one.")
    try:
        asked = found["speculators_config"]
        about = {
            "kind": found["speculators_model_type"],
            "depth": asked["proposal_methods"][0]["speculative_tokens"],
            "window": own["window"],
            "reads": own.get("reads", []),
            "draft_vocabulary": found["draft_vocab_size"],
            "target": {"name": asked["verifier"]["name_or_path"], "lineage": own["lineage"]},
        }
    except (KeyError, IndexError, TypeError):
        about = {"kind": None}
    if (
        about["kind"] not in KINDS
        or not all(kind.holds(about[name]) for name, kind in _SIZES.items())
        or not (_READS.holds(about["reads"]))
    ):
        raise UsageError(f"{path} is damaged: its kind, depth, window, vocabulary or target can't be; "
                         "fetch it again, or train anew.")  # fmt: skip
    return about


def _about(head: Trained, model: Model, *, int8: bool) -> dict[str, Any]:
    config = head.config(model)
    layers = {
        "model_type": "llama",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.eps,
        "vocab_size": model.decoder.config.vocabulary,
    }
    proposal = {"proposal_type": "greedy", "speculative_tokens": head.depth}
    return {
        "architectures": [f"{type(head.module).__name__}Speculator"],
        "speculators_model_type": head.kind,
        "speculators_version": _LAYOUT,
        "speculators_config": {
            "algorithm": head.kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": model.name, "architectures": [model.decoder.config.family]},
        },
        "draft_vocab_size": config.vocabulary,
        "transformer_layer_config": layers,
        "longspec": {
            "version": _VERSION,
            "window": head.window,
            "reads": list(head.module.reads),
            "storage": "int8" if int8 else "float",
            "lineage": model.lineage,
        },
    }


def load_head(folder: str | Path, model: Model) -> Trained:
    """Load a folder's head, in the target's dtype and on its device.

    Raises:
        UsageError: the folder holds no head, or one for another model.
        ModelError: the weights are damaged.
    """
    about = read_about(folder)
    name, lines = about["target"].get("name"), about["target"].get("lineage")
    if lines != model.lineage:
        raise UsageError(
            f"The head in {folder} was trained for {name!r}, whose weights or shape are not those of {model.name}; "
            "take the model that it was trained for, or train a head for this one."
        )
    kind, reads, layers = KINDS[about["kind"]], about["reads"], model.decoder.config.layers
    wanted = len(kind.reads_of(layers))
    if any(layer > layers for layer in reads) or (
        len(reads) != wanted and (reads or not issubclass(kind, Recurrent))  # files from before there were any
    ):
        raise UsageError(f"{Path(folder) / CONFIG} is damaged: it reads the layers {shown(reads)}, and a head of this "
                         f"kind {wanted} of the {layers} of {model.name}; fetch it again, or train anew.")  # fmt: skip
    shard = Shard(Path(folder) / WEIGHTS)
    tensors = {name: shard.take(name) for name in shard.names}
    tensors.pop(_DRAFTED, None)
    tokens = _draft_tokens(Path(folder) / WEIGHTS, tensors.pop(_OFFSETS, None), about, model)
    with torch.device("meta"):  # shapes alone: a config of a few bytes may ask for matrices of gigabytes
        shapes = _module(about["kind"], model, about["window"], reads, about["depth"]).state_dict()
    path, decoder = Path(folder) / WEIGHTS, model.decoder
    state = {name: _plain(path, name, tensors, each).to(decoder.device, decoder.dtype) for name, each in shapes.items()}
    head = new_head(
        about["kind"], model, depth=about["depth"], window=about["window"], tokens=tokens, reads=about["reads"]
    )
    head.module.load_state_dict(state, assign=True)  # copying would convert to the module's fp32
    head.module.requires_grad_(False)
    return head


def _draft_tokens(path: Path, offsets: Tensor | None, about: Mapping[str, Any], model: Model) -> Tensor | None:
    size, vocabulary = about["draft_vocabulary"], model.decoder.config.vocabulary
    if offsets is None and size == vocabulary:
        return None
    if offsets is None or tuple(offsets.shape) != (size,) or offsets.dtype != torch.int64:
        raise ModelError(f"{path} and {CONFIG} don't agree on the draft vocabulary: they aren't of one head.")
    tokens = offsets + torch.arange(size)
    if int(tokens[0]) < 0 or int(tokens[-1]) >= vocabulary or bool((tokens.diff() <= 0).any()):
        raise ModelError(f"{path} is damaged: {_OFFSETS} must name {size:,} of the target's tokens, rising.")
    return tokens


def _plain(path: Path, name: str, tensors: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    held, scale = tensors.get(name), tensors.get(name + _SCALE)
    if held is not None:
        check_values([name], [] if scale is not None and held.dtype == torch.int8 else [held.dtype], [])
    if scale is not None:
        check_values([name + _SCALE], [scale.dtype], [])
    if held is None or held.shape != wanted.shape or (scale is not None and scale.shape != wanted.shape[:1]):
        seen = "nothing" if held is None else list(held.shape)
        raise ModelError(f"{path} is damaged or of another shape: {name} is {seen}, expected {list(wanted.shape)}.")
    value = held.float() if scale is None else held.float() * scale.float()[:, None]
    if not bool(value.isfinite().all()):
        raise ModelError(f"{path} is damaged: {name} has values that are no numbers.")
    return value


def _coded(value: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to int8 [n, m], with a symmetric scale for each row [n]."""
    scale = value.float().abs().amax(1).clamp_min(1e-12) / 127
    return (value.float() / scale[:, None]).round().to(torch.int8), scale


def _final_norm(model: Model) -> Tensor:
    """Weights [width] of the target's final norm: its output for a vector of ones."""
    ones = torch.ones(1, model.decoder.config.width, dtype=model.decoder.dtype, device=model.decoder.device)
    return model.decoder.normed(ones)[0].float()
