"""Conversion of a GGUF file to a Hugging Face folder: config and tokenizer once, weights once per dtype.

Takes a pulled model's folder; gives folders in it that transformers and `Weights` both load. Weights are written
tensor by tensor, a layer's q, k, v and its gate, up adjacent, so that each group can be read as one matrix.
"""

from __future__ import annotations

import json
from itertools import count
from math import prod
from pathlib import Path

import torch

from longspec.errors import ModelError
from longspec.model.files.store import SOURCE, Report, need_room, quiet, workspace
from longspec.model.gguf.file import GgufFile, read_gguf
from longspec.model.weights.safetensors import write_shard

__all__ = ["converted", "place_of", "write_texts"]

_FOLDERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def converted(folder: Path, dtype: torch.dtype, report: Report = quiet) -> Path:
    """The folder inside `folder` that holds the model in `dtype`; converted from its GGUF file on first use.

    Raises ModelError where it can't be made.
    """
    target = place_of(folder, dtype)
    if target.is_dir():
        return target
    with workspace(folder, report) as temporary:
        if not target.is_dir():  # another process may have made it in the meantime
            file = read_gguf(folder / SOURCE)
            made = temporary / target.name
            made.mkdir()
            need_room(folder, sum(prod(file.shape(name)) for name in file.names) * dtype.itemsize)
            write_texts(file, made, dtype)
            _write_weights(file, made / "model.safetensors", dtype, report)
            made.rename(target)
    return target


def place_of(folder: Path, dtype: torch.dtype) -> Path:
    """The path of the model in `dtype`. Raises ModelError for a dtype that isn't stored."""
    if dtype not in _FOLDERS:
        raise ModelError(f"Weights can be kept as {', '.join(_FOLDERS.values())}, and not as {dtype}.")
    return folder / _FOLDERS[dtype]


def write_texts(file: GgufFile, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write everything but the weights: config, generation config, tokenizer and its config."""
    config = file.config() | ({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})
    texts = {
        "config.json": config,
        "generation_config.json": file.generation_config(),
        "tokenizer_config.json": file.tokenizer_config(),
    }
    for name, text in texts.items():
        (folder / name).write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    file.tokenizer().save(str(folder / "tokenizer.json"))


def _write_weights(file: GgufFile, path: Path, dtype: torch.dtype, report: Report) -> None:
    stage, total, done = f"converting to {_FOLDERS[dtype]}", len(file.names), count()

    def take(name: str) -> torch.Tensor:
        report(stage, next(done), total)
        return file.take(name)

    write_shard(path, [(name, file.shape(name)) for name in file.names], dtype, take)
    report(stage, total, total)
