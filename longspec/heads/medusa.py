"""Medusa heads (2401.10774): head k predicts the token k + 2 positions after a hidden state's, k from 0.

    head k:  n times  h <- h + silu(W h + b),  then logits = W_k h, with the target's LM head if the file has no W_k

Those that longspec trains (`Heads`) have one block each, n = 1, behind a linear probe of their depth, and the target's
LM head. Of published ones this takes a folder and a target, and gives a `Medusa`. These files don't identify the
weights that they were trained for: only sizes are compared with the target's. Pickles (medusa_lm_head.pt) are not read;
safetensors of the same names are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspec.errors import ModelError, UsageError
from longspec.heads.all_depths import AllDepths
from longspec.heads.head import Fit, unit
from longspec.heads.layers import Norm
from longspec.machine.schema import whole
from longspec.model.config import Config
from longspec.model.load import Model
from longspec.model.weights.read import check_values
from longspec.model.weights.safetensors import Shard

__all__ = ["Heads", "Medusa", "load_medusa"]

_MOST = 64  # heads; also residual blocks in each
_FILES = ("medusa_lm_head.safetensors", "model.safetensors")


class Heads(AllDepths):
    """Trainable heads, one a depth."""

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        width = config.width
        self.probes = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = Norm(width, config.eps)
        for block in self.blocks:
            nn.init.zeros_(block.weight)  # type: ignore[arg-type]

    def all_depths(self, features: Tensor, tokens: Tensor) -> Tensor:
        probed = [probe(unit(features)) for probe in self.probes]
        return torch.stack([h + F.silu(block(h)) for h, block in zip(probed, self.blocks, strict=True)], -2)

    def start(self, fit: Fit) -> None:
        last = self.reads[-1]
        for i, (probe, block) in enumerate(zip(self.probes, self.blocks, strict=True)):
            probe.weight.copy_(fit(lambda batch: unit(batch.states[last]), i + 1))  # type: ignore[operator]
            nn.init.zeros_(block.bias)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Medusa:
    """blocks: by head, weight and bias of each residual block; written: by head, W_k [V, width], None: the target's."""

    blocks: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    written: tuple[Tensor | None, ...]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, without the target's LM head."""
        blocks = (tensor for head in self.blocks for block in head for tensor in block)
        return sum(tensor.nbytes for tensor in (*blocks, *self.written) if tensor is not None)

    def run(self, head: int, hidden: Tensor) -> Tensor:
        """A head's residual blocks over normed hidden states [r, width]."""
        for weight, bias in self.blocks[head]:
            hidden = hidden + F.silu(F.linear(hidden, weight, bias))
        return hidden


def load_medusa(folder: Path, raw: Mapping[str, Any], model: Model) -> Medusa:
    """Load heads from a folder's safetensors. raw: the parsed config.json.

    Raises:
        UsageError: the heads are for a model of other sizes.
        ModelError: the files are damaged or missing.
    """
    target = model.decoder.config
    count: Any = raw.get("medusa_num_heads")
    blocks: Any = raw.get("medusa_num_layers", 1)
    if not whole(1, _MOST).holds(count) or not whole(0, _MOST).holds(blocks):
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
        check_values([name], [tensor.dtype], [])
        return tensor.to(model.decoder.device, model.decoder.dtype)

    width, last = target.width, f"{blocks}.weight"
    made = []
    for k in range(count):
        names = [f"{k}.{i}.linear" for i in range(blocks)]
        made.append(tuple((take(f"{name}.weight", width, width), take(f"{name}.bias", width)) for name in names))
    written = [take(f"{k}.{last}", target.vocabulary, width) if f"{k}.{last}" in held else None for k in range(count)]
    return Medusa(tuple(made), tuple(written))
