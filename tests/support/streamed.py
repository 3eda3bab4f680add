"""Decoders whose layers are read from disk for each pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.store import quiet
from longspec.model.weights.footprint import shapes_of
from longspec.model.weights.streamed import Streamed


def streamed(folder: Path, dtype: torch.dtype = torch.float32, kept: int = 0, pool: int = 0, **options: Any) -> Decoder:
    """The decoder of a folder, or of a GGUF file, with so many layers in memory."""
    checkpoint = Checkpoint("tiny", gguf=folder) if folder.is_file() else Checkpoint("tiny", folder)
    coded, config = options.get("coded"), Config.read(checkpoint.config())
    weights = checkpoint.weights(dtype, coded=coded is not None)
    shapes, _ = shapes_of(checkpoint, weights, config, coded)
    made = Streamed(weights, shapes, kept, pool, quiet)
    return Decoder(config, made, torch.device("cpu"), **options)
