"""Experts' matrices that one tensor stacks, taken apart: each under the name that other checkpoints give it.

Takes a folder's tensors; gives `experts.0.down_proj.weight` and so on. Most families stack [experts, out, in], whose
parts are views. gpt-oss's are held otherwise, beside a bias `NAME_bias` [experts, out]:

    NAME                        [experts, in, out] in bf16
    NAME_blocks, NAME_scales    [experts, out, in / 32, 16] and [experts, out, in / 32]: MXFP4 (OCP Microscaling 1.0)

and `gate_up_proj` alternates between outputs of the gate and of up. A byte holds two neighbours, the earlier in its
lower half; in GGUF's blocks, which the kernels read, the lower halves are a block's first 16 columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longspec.errors import ModelError
from longspec.model.config_values import MOST_EXPERTS
from longspec.model.weights.quantized import Blocks
from longspec.model.weights.safetensors import Shard

__all__ = ["Experts", "by_expert"]

_STACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(_blocks|_scales|_bias)?")
_PART = re.compile(r"(.+\.experts)\.(\d+)\.(gate_up_proj|down_proj)\.(weight|bias)")
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def by_expert(sources: Mapping[str, Shard]) -> dict[str, Shard | Experts]:
    """The tensors with those that stack all experts' matrices taken apart.

    Raises:
        ModelError: one stacks more than a model has: each gets a name, whatever its size.
    """
    made: dict[str, Shard | Experts] = {}
    beside_a_bias: dict[tuple[str, str], Experts] = {}
    for name, shard in sources.items():
        match = _STACKED.fullmatch(name)
        if match is None or len(shape := shard.shape(name)) < 2:
            made[name] = shard
            continue
        if shape[0] > MOST_EXPERTS:
            raise ModelError(
                f"{shard.path}: {name} stacks {shape[0]:,} experts; at most {MOST_EXPERTS:,} were expected."
            )
        stem, matrix, kind = match.groups()
        if kind is None and f"{name}_bias" not in sources:
            if len(shape) != 3:
                made[name] = shard
                continue
            parts = [f"{stem}.{i}.{matrix}.weight" for i in range(shape[0])]
            shard.split(name, parts)
            made |= dict.fromkeys(parts, shard)
            continue
        experts = beside_a_bias.setdefault((stem, matrix), Experts(sources))
        suffix = "bias" if kind == "_bias" else "weight"
        if kind != "_scales":
            made |= {f"{stem}.{i}.{matrix}.{suffix}": experts for i in range(shape[0])}
    return made


class Experts:
    """gpt-oss's matrices and biases, one by one, with the gate's outputs before up's."""

    def __init__(self, sources: Mapping[str, Shard]) -> None:
        self.path = next(iter(sources.values())).path.parent
        self._sources = sources

    def shape(self, name: str) -> tuple[int, ...]:
        """[out, in] of a matrix, [out] of a bias."""
        stacked, _, kind = self._place(name)
        if kind == "bias":
            return self._whole(f"{stacked}_bias", 2).shape[1:]
        if f"{stacked}_blocks" in self._sources:
            _, size, groups, _ = self._whole(f"{stacked}_blocks", 4).shape
            return size, 32 * groups
        _, width, size = self._whole(stacked, 3).shape
        return size, width

    def take(self, name: str) -> Tensor:
        """A matrix [out, in] or a bias [out]: as the file has it, or in fp32 where it holds codes."""
        stacked, expert, kind = self._place(name)
        if kind == "bias":
            return _in_halves(name, self._whole(f"{stacked}_bias", 2)[expert])
        if f"{stacked}_blocks" not in self._sources:
            return _in_halves(name, self._whole(stacked, 3)[expert].T)
        codes, scales = self._codes(name)
        steps = torch.exp2(scales.float() - 127)
        return (_FP4[torch.stack((codes & 15, codes >> 4), -1).long()].flatten(2) * steps[..., None]).flatten(1)

    def take_run(self, names: Sequence[str]) -> Tensor | None:
        """None: what is put in another order has no neighbours."""
        return None

    def blocks(self, name: str) -> Blocks | None:
        """A matrix's own codes in GGUF's order; None where the file holds values."""
        stacked, _, kind = self._place(name)
        if kind == "bias" or f"{stacked}_blocks" not in self._sources:
            return None
        size, width = self.shape(name)
        return Blocks("MXFP4", size, width, lambda: self._blocks(name))

    def release(self, name: str) -> None:
        """Let go of the file's pages, once the last expert was taken: they hold all of them."""
        stacked, expert, _ = self._place(name)
        for whole in (stacked, f"{stacked}_blocks", f"{stacked}_scales"):
            if (shard := self._sources.get(whole)) is not None and expert + 1 == shard.shape(whole)[0]:
                shard.release(whole)

    def _blocks(self, name: str) -> Tensor:
        """Rows of blocks, each a scale and 16 bytes."""
        codes, scales = self._codes(name)
        each = torch.stack((codes & 15, codes >> 4), -1).flatten(2)  # [out, groups, 32]
        pairs = each[..., :16] | each[..., 16:] << 4
        return torch.cat((scales[..., None], pairs), -1).flatten(1)

    def _codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes [out, groups, 16] and scales [out, groups], both uint8."""
        stacked, expert, _ = self._place(name)
        codes, scales = self._whole(f"{stacked}_blocks", 4), self._whole(f"{stacked}_scales", 3)
        if codes.shape[:3] != scales.shape or codes.shape[3] != 16 or {codes.dtype, scales.dtype} != {torch.uint8}:
            raise ModelError(
                f"{stacked}_blocks {list(codes.shape)} and {stacked}_scales {list(scales.shape)} aren't blocks of 32 "
                "values of 4 bits (MXFP4), in bytes."
            )
        return _in_halves(name, codes[expert]), _in_halves(name, scales[expert])

    def _whole(self, name: str, dimensions: int) -> Tensor:
        if name not in self._sources:
            raise ModelError(f"The tensor {name} is missing from {self.path}: the files are incomplete.")
        tensor = self._sources[name].take(name)
        if tensor.ndim != dimensions or 0 in tensor.shape:
            raise ModelError(f"{name} should have {dimensions} dimensions, and has the shape {list(tensor.shape)}.")
        return tensor

    def _place(self, name: str) -> tuple[str, int, str]:
        """The tensor that holds it, the expert's number, and weight or bias."""
        match = _PART.fullmatch(name)
        assert match is not None, name
        stem, expert, matrix, kind = match.groups()
        return f"{stem}.{matrix}", int(expert), kind


def _in_halves(name: str, rows: Tensor) -> Tensor:
    """Outputs that alternate between gate and up, as the gate's and then up's; others as they are."""
    return torch.cat((rows[0::2], rows[1::2])) if ".gate_up_proj." in name else rows
