"""Medusa heads (2401.10774) as they are published: each writes the token so many places on, from one hidden state.

    head k:  n times  h <- h + silu(W h + b),  then logits = W_k h; the target's own head where the file has no W_k

Takes a folder and a target; gives a `Medusa`. Such a file doesn't say which weights it was trained for: its sizes must
be the target's. Published pickles (medusa_lm_head.pt) are not read; safetensors of the same names are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from longspec.errors import ModelError, UsageError
from longspec.model.load import Model
from longspec.model.weights.safetensors import Shard

__all__ = ["Medusa", "load_medusa"]

_MOST = 64  # heads, and blocks in each
_FILES = ("medusa_lm_head.safetensors", "model.safetensors")


@dataclass(frozen=True, slots=True)
class Medusa:
    """blocks: of each head, its weights and biases; written: [V, width] of each, None for the target's own."""

    blocks: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    written: tuple[Tensor | None, ...]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights; those of the target's head that it writes with aren't counted."""
        blocks = (tensor for head in self.blocks for block in head for tensor in block)
        return sum(tensor.nbytes for tensor in (*blocks, *self.written) if tensor is not None)

    def run(self, head: int, hidden: Tensor) -> Tensor:
        """What a head makes of normed hidden states [r, width]."""
        for weight, bias in self.blocks[head]:
            hidden = hidden + F.silu(F.linear(hidden, weight, bias))
        return hidden


def load_medusa(folder: Path, raw: Mapping[str, Any], model: Model) -> Medusa:
    """Of the folder's config.json, which is given, and its weights.

    Raises:
        UsageError: it is for a model of other sizes.
        ModelError: the files are damaged or missing.
    """
    target, count, blocks = model.decoder.config, raw.get("medusa_num_heads"), raw.get("medusa_num_layers", 1)
    if type(count) is not int or type(blocks) is not int or not (1 <= count <= _MOST and 0 <= blocks <= _MOST):
        raise ModelError(
            f"{folder}/config.json is damaged: medusa_num_heads and medusa_num_layers must be 1 to {_MOST}."
        )
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise ModelError(
            f"{folder} holds no {' or '.join(_FILES)}; longspec reads no pickled weights: convert them first."
        )
    shard = Shard(path)
    held = {name.removeprefix("medusa_head."): name for name in shard.names}

    def take(name: str, *shape: int) -> Tensor:
        tensor = shard.take(held[name]) if name in held else None
        if tensor is None or tuple(tensor.shape) != shape:
            seen = "missing" if tensor is None else list(tensor.shape)
            raise UsageError(f"The head in {folder} doesn't fit {model.name}: its {name} is {seen}, expected "
                             f"{list(shape)}; take the model that it was trained for.")  # fmt: skip
        return tensor.to(model.decoder.device, model.decoder.dtype)

    width, last = target.width, f"{blocks}.weight"
    made = []
    for k in range(count):
        names = [f"{k}.{i}.linear" for i in range(blocks)]
        made.append(tuple((take(f"{name}.weight", width, width), take(f"{name}.bias", width)) for name in names))
    written = [take(f"{k}.{last}", target.vocabulary, width) if f"{k}.{last}" in held else None for k in range(count)]
    return Medusa(tuple(made), tuple(written))
