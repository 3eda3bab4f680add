"""A checkpoint's matrices in 4 bits, kept on disk: what `--dtype int4` quantizes at every load is quantized once.

Takes a folder of plain weights; gives a folder of compressed-tensors (symmetric, groups of 32, fp16 scales), which
other engines load too. Its codes are those that loading would make, bit for bit. It is bound to the files that it was
made of.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from longspec.errors import UsageError
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.store import Report, models_folder, need_room, quiet, workspace
from longspec.model.weights.quantized import GROUP, STRIP, Piece
from longspec.model.weights.read import Weights

__all__ = ["keep", "kept"]

_MATRICES = tuple(
    f".{name}_proj.weight" for name in ("q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down")
)  # a layer's, as its reader names them
_SPAN = 8 * (2 * STRIP + STRIP * GROUP // 2)  # bytes that a tile of Q4_0 has for 256 columns
_SHARD = 1 << 30  # bytes that are held until they are written
_SCHEME = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False}


def kept(checkpoint: Checkpoint) -> Path | None:
    """The folder of its matrices in 4 bits; None where none was kept, or its files have changed since."""
    if checkpoint.folder is None or checkpoint.gguf is not None:
        return None
    place = _place(checkpoint.folder)
    return place if place.is_dir() else None


def keep(checkpoint: Checkpoint, report: Report = quiet) -> Path:
    """Quantize a folder's matrices and keep them. Raises UsageError where they are codes already, ModelError where the
    weights can't be read or the disk is full.
    """
    if checkpoint.folder is None or checkpoint.gguf is not None or checkpoint.scheme() is not None:
        raise UsageError(
            f"{checkpoint.name} holds {checkpoint.format}: it is read as it is, and --dtype keeps nothing."
        )
    target = _place(checkpoint.folder)
    with workspace(target, report) as temporary:
        if not target.is_dir():  # another process may have made it in the meantime
            weights = checkpoint.weights(torch.bfloat16)
            made = temporary / target.name
            made.mkdir()
            need_room(made, sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors")))
            _write_texts(checkpoint, made)
            _write_weights(weights, made, report)
            made.rename(target)
    return target


def _place(folder: Path) -> Path:
    files = sorted(path.resolve() for path in folder.glob("*.safetensors"))
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return models_folder() / "int4" / hashlib.sha256(repr(stamps).encode()).hexdigest()[:20]


def _write_texts(checkpoint: Checkpoint, made: Path) -> None:
    assert checkpoint.folder is not None
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copyfile(path, made / path.name)
    (made / "model.safetensors.index.json").unlink(missing_ok=True)
    groups = {"group_0": {"targets": ["Linear"], "weights": _SCHEME}}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    config = checkpoint.config() | {"quantization_config": said | {"ignore": ["lm_head"]}}
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_weights(weights: Weights, made: Path, report: Report) -> None:
    """Shards of about a gigabyte, and their index."""
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    numbers = count(1)

    def write() -> None:
        name = f"model-{next(numbers):05}.safetensors"
        save_file(held, made / name, {"format": "pt"})
        index.update(dict.fromkeys(held, name))
        held.clear()

    for done, name in enumerate(weights):
        report("quantizing", done, len(weights))
        held |= _packed(name, weights[name])
        if sum(tensor.nbytes for tensor in held.values()) > _SHARD:
            write()
    write()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (made / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A layer's matrix as codes in int32, the first column lowest, and scales; another tensor as it is."""
    if not name.endswith(_MATRICES) or weight.ndim != 2 or weight.shape[0] % STRIP or weight.shape[1] % GROUP:
        return {name: weight.contiguous()}
    piece = Piece.of_values(weight, "Q4_0")
    spans = [_span(part) for part in torch.split(piece.tiles, _SPAN, 1)]
    codes = torch.cat([codes for codes, _ in spans], 1)
    stem = name.removesuffix(".weight")
    return {
        f"{stem}.weight_packed": (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int32),
        f"{stem}.weight_scale": torch.cat([steps for _, steps in spans], 1),
        f"{stem}.weight_shape": torch.tensor(weight.shape),
    }


def _span(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and steps [out, groups] of tiles' columns, 256 or what is left, as formats.h lays out Q4_0."""
    groups = tiles.shape[1] // (_SPAN // 8)
    steps = tiles[:, : groups * 2 * STRIP].contiguous().view(torch.float16).view(-1, groups, STRIP)
    planes = tiles[:, tiles.shape[1] - groups * 256 :].reshape(-1, groups, 4, STRIP, 4)  # [tile, group, word, out, in]
    codes = torch.stack((planes & 15, planes >> 4), 2).permute(0, 4, 1, 2, 3, 5)
    return codes.reshape(-1, groups * GROUP), steps.transpose(1, 2).reshape(-1, groups)
