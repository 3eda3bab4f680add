"""A head and its files: `head.json`, which says what it is and whose, and `head.safetensors`.

Takes a folder; gives a `Trained` head for a loaded target, or refuses one that was trained for another. Nothing in a
file is believed: sizes are bounded and every tensor's shape is held against the target's.

Matrices may be stored as int8 with a scale per row: a quarter of fp32, and read back as floats.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.errors import LongspecError, ModelError, UsageError
from longspec.heads import KINDS
from longspec.heads.clover import Clover
from longspec.heads.clover2 import Clover2
from longspec.heads.layers import block_of
from longspec.model.config import Config
from longspec.model.load import Model
from longspec.model.shard import Shard

__all__ = ["CONFIG", "WEIGHTS", "Trained", "is_head", "load_head", "new_head", "read_about", "replaced", "save_head"]

CONFIG, WEIGHTS = "head.json", "head.safetensors"
MOST_DEPTH, MOST_WINDOW = 64, 1 << 20

_KIND, _VERSION = "longspec head", 1
_MOST_NBYTES = 64 << 10  # of the config
_SCALE = ".scale"
_TOKENS = "draft_tokens"


@dataclass(frozen=True, slots=True)
class Trained:
    """A head, and what it was trained for."""

    kind: str  # a key of KINDS
    depth: int  # tokens that it drafts behind each other
    window: int  # rows that its layers read
    tokens: Tensor | None  # [D] int64, rising: the target's tokens that it drafts; None is all
    module: Clover | Clover2

    def rows(self, model: Model) -> Tensor:
        """[D, width]: those of the target's head that it writes with."""
        head = model.decoder.head
        return head if self.tokens is None else head[self.tokens.to(head.device)]

    def config(self, model: Model) -> Config:
        """Of its layers."""
        target = model.decoder.config
        size = target.vocabulary if self.tokens is None else len(self.tokens)
        return block_of(target, self.module.LAYERS, self.window, size)


def new_head(
    kind: str, model: Model, *, depth: int = 5, window: int = 512, tokens: Tensor | None = None, seed: int = 0
) -> Trained:
    """An untrained head. Its final norm is the target's.

    Raises:
        UsageError: there is no such kind, or a number is out of range.
    """
    if kind not in KINDS:
        raise UsageError(f"There is no head named {kind!r}; use one of: {', '.join(KINDS)}.")
    if not 1 <= depth <= MOST_DEPTH or not 1 <= window <= MOST_WINDOW:
        raise UsageError(f"A head of depth {depth} and window {window} can't be made; at most {MOST_DEPTH} and "
                         f"{MOST_WINDOW:,} are possible.")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = KINDS[kind](block_of(model.decoder.config, KINDS[kind].LAYERS, window, 1))
    with torch.no_grad():
        module.norm.weight.copy_(_final_norm(model))
    return Trained(kind, depth, window, tokens, module.to(model.decoder.device))


def is_head(name: str) -> bool:
    """Whether a drafter's name is the path of a folder with a head."""
    return os.sep in name or (Path(name) / CONFIG).is_file()


def save_head(folder: str | Path, head: Trained, model: Model, *, int8: bool = False, **said: Any) -> None:
    """Write the files, each atomically, the config last. said: what else head.json should say, for people.

    Raises:
        LongspecError: they can't be written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, value in sorted(head.module.state_dict().items()):
        held = value.detach().cpu().contiguous()
        if int8 and held.dim() == 2:
            tensors |= dict(zip((name, name + _SCALE), _coded(held), strict=True))
        else:
            tensors[name] = held
    if head.tokens is not None:
        tensors[_TOKENS] = head.tokens.cpu()
    about = {
        "format": _KIND,
        "version": _VERSION,
        "kind": head.kind,
        "depth": head.depth,
        "window": head.window,
        "draft_vocabulary": None if head.tokens is None else len(head.tokens),
        "storage": "int8" if int8 else "float",
        "target": {"name": model.name, "lineage": model.lineage},
        **said,
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replaced(folder / WEIGHTS, lambda path: save_file(tensors, path))
        replaced(folder / CONFIG, lambda path: path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8"))
    except OSError as error:
        raise LongspecError(f"{folder} can't be written: {error.strerror or error}; name another folder.") from error


def replaced(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside the path, on the disk before it takes its place: another process reads the old or the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    made = Path(name)
    try:
        write(made)
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        made.chmod(0o644)
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def read_about(folder: str | Path) -> dict[str, Any]:
    """What head.json says, its own numbers checked.

    Raises:
        UsageError: there is none, or it is no head's.
    """
    path = Path(folder) / CONFIG
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_NBYTES + 1)
        found = json.loads(data) if len(data) <= _MOST_NBYTES else None
    except OSError as error:
        raise UsageError(
            f"{folder} holds no head that can be read ({CONFIG}: {error.strerror}); `longspec train` writes one."
        ) from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != _KIND or found.get("version") != _VERSION:
        raise UsageError(f"{path} is no head that this longspec knows; `longspec train` writes one.")
    size, target = found.get("draft_vocabulary"), found.get("target")
    if (
        found.get("kind") not in KINDS
        or not _is_number(found.get("depth"), MOST_DEPTH)
        or not _is_number(found.get("window"), MOST_WINDOW)
        or not (size is None or _is_number(size, 1 << 31))
        or not isinstance(target, dict)
    ):
        raise UsageError(f"{path} is damaged: its kind, depth, window, draft_vocabulary or target can't be; "
                         "fetch it again, or train anew.")  # fmt: skip
    return found


def load_head(folder: str | Path, model: Model) -> Trained:
    """The folder's head, in the target's dtype and on its device.

    Raises:
        UsageError: the folder holds no head, or one for another model.
        ModelError: its weights are damaged.
    """
    about = read_about(folder)
    name, lines = about["target"].get("name"), about["target"].get("lineage")
    if lines != model.lineage:
        raise UsageError(
            f"The head in {folder} was trained for {name!r}, whose weights or shape are not those of {model.name}; "
            "take the model that it was trained for, or train a head for this one."
        )
    shard = Shard(Path(folder) / WEIGHTS)
    tensors = {name: shard.take(name) for name in shard.names}
    tokens = _draft_tokens(Path(folder) / WEIGHTS, tensors.pop(_TOKENS, None), about, model)
    head = new_head(about["kind"], model, depth=about["depth"], window=about["window"], tokens=tokens)
    state = head.module.state_dict()
    for name, held in state.items():
        state[name] = _plain(Path(folder) / WEIGHTS, name, tensors, held)
    head.module.load_state_dict(state)
    head.module.to(model.decoder.device, model.decoder.dtype).requires_grad_(False)
    return head


def _draft_tokens(path: Path, tokens: Tensor | None, about: Mapping[str, Any], model: Model) -> Tensor | None:
    size = about["draft_vocabulary"]
    if (tokens is None) != (size is None):
        raise ModelError(f"{path} and {CONFIG} don't agree on the draft vocabulary: they aren't of one head.")
    if tokens is None:
        return None
    good = tokens.dtype == torch.int64 and tuple(tokens.shape) == (size,) and int(tokens[0]) >= 0
    if not good or int(tokens[-1]) >= model.decoder.config.vocabulary or bool((tokens.diff() <= 0).any()):
        raise ModelError(f"{path} is damaged: {_TOKENS} must name {size:,} of the target's tokens, rising.")
    return tokens.clone()


def _plain(path: Path, name: str, tensors: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    held, scale = tensors.get(name), tensors.get(name + _SCALE)
    if held is None or held.shape != wanted.shape or (scale is not None and scale.shape != wanted.shape[:1]):
        seen = "nothing" if held is None else list(held.shape)
        raise ModelError(f"{path} is damaged or of another shape: {name} is {seen}, expected {list(wanted.shape)}.")
    value = held.float() if scale is None else held.float() * scale.float()[:, None]
    if not bool(value.isfinite().all()):
        raise ModelError(f"{path} is damaged: {name} has values that are no numbers.")
    return value


def _coded(value: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, m], and a scale for each row [n]."""
    scale = value.float().abs().amax(1).clamp_min(1e-12) / 127
    return (value.float() / scale[:, None]).round().to(torch.int8), scale


def _final_norm(model: Model) -> Tensor:
    """The factors of the target's final norm: what it makes of a row of ones."""
    ones = torch.ones(1, model.decoder.config.width, dtype=model.decoder.dtype, device=model.decoder.device)
    return model.decoder.normed(ones)[0].float()


def _is_number(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most
