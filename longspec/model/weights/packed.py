"""Quantized matrices of safetensors files, under the names that their values have elsewhere.

Takes a folder's tensors and a `Scheme`; gives values, or blocks that the kernels read as codes. A matrix is several
tensors in the files:

    fp8     weight, and weight_scale_inv or weight_scale: of the matrix, of each row, or of blocks
    gptq    qweight int32 [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in]
    awq     the same with qweight [in, out / 8], and eight columns in the order 0 2 4 6 1 3 5 7
    packed  weight_packed int32 [out, in / 8], weight_scale [out, groups], weight_zero_point [out / 8, groups]

A value is scale * (code - zero point), rounded once in fp32, and once more where bf16 is asked for, as transformers
rounds it. What the kernels read are the file's codes, or its bytes of FP8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longspec.errors import ModelError
from longspec.model.weights.quantized import FP8, Blocks
from longspec.model.weights.safetensors import Shard
from longspec.model.weights.scheme import Scheme

__all__ = ["Packed", "packed"]

_FIRST = {"fp8": "weight", "gptq": "qweight", "awq": "qweight", "packed": "weight_packed"}
_OTHERS = {
    "fp8": ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale"),
    "gptq": ("qzeros", "scales", "g_idx"),
    "awq": ("qzeros", "scales"),
    "packed": ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
}
_AWQ = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where each of eight columns stands
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_STRIP = 1024  # rows whose values stand in fp32 at once


def packed(sources: Mapping[str, Shard], scheme: Scheme, dtype: torch.dtype) -> dict[str, Shard | Packed]:
    """The tensors with each quantized matrix as one, `NAME.weight`, whose values are in `dtype`."""
    first = f".{_FIRST[scheme.layout]}"
    stems = {name.removesuffix(first) for name, shard in sources.items() if name.endswith(first)}
    if scheme.layout == "fp8":
        stems = {stem for stem in stems if sources[f"{stem}.weight"].dtype(f"{stem}.weight") == torch.float8_e4m3fn}
    parts = {f"{stem}.{part}" for stem in stems for part in (_FIRST[scheme.layout], *_OTHERS[scheme.layout])}
    made: dict[str, Shard | Packed] = {name: shard for name, shard in sources.items() if name not in parts}
    whole = Packed(sources, scheme, dtype)
    return made | {f"{stem}.weight": whole for stem in sorted(stems)}


class Packed:
    """The quantized matrices of a folder. Its names are those of their values."""

    def __init__(self, sources: Mapping[str, Shard], scheme: Scheme, dtype: torch.dtype) -> None:
        self.path = next(iter(sources.values())).path.parent if sources else Path()
        self._sources, self._scheme, self._dtype = sources, scheme, dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the matrix [out, in]."""
        layout, (rows, columns) = self._scheme.layout, self._part(name, _FIRST[self._scheme.layout], 2).shape
        match layout:
            case "gptq":
                return columns, 8 * rows
            case "awq":
                return 8 * columns, rows
            case "packed":
                return rows, 8 * columns
            case _:
                return rows, columns

    def take(self, name: str) -> Tensor:
        """The matrix in the dtype asked for: [out, in]. Raises ModelError where its parts don't fit each other."""
        made = torch.empty(self.shape(name), dtype=self._dtype)
        at = 0
        for values in self._fp8(name) if self._scheme.layout == "fp8" else self._grouped(name):
            made[at : at + len(values)] = values
            at += len(values)
        self.release(name)
        return made

    def take_run(self, names: Sequence[str]) -> Tensor | None:
        """None: values that are made have no neighbours."""
        return None

    def blocks(self, name: str) -> Blocks | None:
        """The matrix in the file's codes or bytes; None of FP8 with scales for fewer columns than 128."""
        if not self._scheme.coded:
            return None
        size, width = self.shape(name)
        if self._scheme.layout == "fp8":
            return Blocks(FP8, size, width, lambda: self._with_scales(name))
        plain = self._scheme.symmetric and self._part(name, "weight_scale", 2).dtype == torch.float16
        group = self._scheme.group or width
        if group % 128 == 0:
            return Blocks("INT4_128", size, width, lambda: self._with_zeros(name, 128))
        if plain:
            return Blocks("Q4_0", size, width, lambda: self._like_q4_0(name))
        return Blocks("INT4_32", size, width, lambda: self._with_zeros(name, 32))

    def release(self, name: str) -> None:
        """Let go of the files' pages that hold the matrix."""
        for part in (_FIRST[self._scheme.layout], *_OTHERS[self._scheme.layout]):
            if (shard := self._sources.get(full := _part_of(name, part))) is not None:
                shard.release(full)

    def _part(self, name: str, part: str, dimensions: int | None = None) -> Tensor:
        full = _part_of(name, part)
        if full not in self._sources:
            raise ModelError(f"The tensor {full} is missing from {self.path}: the files are incomplete.")
        tensor = self._sources[full].take(full)
        if 0 in tensor.shape or tensor.ndim != (tensor.ndim if dimensions is None else dimensions):
            wanted = "" if dimensions is None else f"{dimensions} dimensions and "
            raise ModelError(f"{full} should have {wanted}values, and has the shape {list(tensor.shape)}.")
        return tensor

    def _scales(self, name: str, part: str, dimensions: int | None = None) -> Tensor:
        """Scales in fp32."""
        scales = self._part(name, part, dimensions)
        if scales.dtype not in _FLOATS:
            said = str(scales.dtype).removeprefix("torch.")
            raise ModelError(f"{_part_of(name, part)} is in {said}; scales in fp32, bf16 or fp16 were expected.")
        return scales.float()

    def _fp8(self, name: str) -> Iterator[Tensor]:
        """Strips of rows, in fp32."""
        weight, scale, rows, columns = self._read_fp8(name)
        for start in range(0, len(weight), _STRIP):
            strip = weight[start : start + _STRIP].float()
            own = scale[torch.arange(start, start + len(strip)) // rows]
            yield strip * own.repeat_interleave(columns, 1)[:, : weight.shape[1]]

    def _with_scales(self, name: str) -> Tensor:
        """Rows of bytes, and behind them a scale in fp32 for each 128 columns."""
        weight, scale, rows, columns = self._read_fp8(name)
        places = torch.arange(0, weight.shape[1], 128) // columns
        spread = scale[torch.arange(len(weight)) // rows][:, places].contiguous()
        return torch.cat((weight.view(torch.uint8), spread.view(torch.uint8)), 1)

    def _read_fp8(self, name: str) -> tuple[Tensor, Tensor, int, int]:
        """Values without their scales [out, in], scales in fp32, and for how many rows and columns one is."""
        weight = self._part(name, "weight", 2)
        named = "weight_scale_inv" if _part_of(name, "weight_scale_inv") in self._sources else "weight_scale"
        scale = self._scales(name, named)
        size, width = weight.shape
        rows, columns = self._scheme.block or (1, width)
        if scale.numel() == 1:
            rows, columns, scale = size, width, scale.view(1, 1)
        elif scale.numel() == size and scale.shape[0] == size:
            rows, columns, scale = 1, width, scale.view(size, 1)
        if scale.shape != (-(-size // rows), -(-width // columns)):
            raise ModelError(
                f"{_part_of(name, named)} has the shape {list(scale.shape)}, which isn't one scale, one for each of "
                f"{size} rows, or one for each block of {rows} x {columns} of the matrix [{size}, {width}]."
            )
        return weight, scale, rows, columns

    def _grouped(self, name: str) -> Iterator[Tensor]:
        """Strips of rows, in fp32."""
        pairs, steps, zeros = self._read(name)
        for start in range(0, len(pairs), _STRIP):
            rows = slice(start, start + _STRIP)
            codes = _nibbles(pairs[rows]).view(len(steps[rows]), steps.shape[1], -1).float()
            yield (steps[rows, :, None] * (codes - zeros[rows, :, None])).flatten(1)

    def _read(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes in pairs [out, in / 2] uint8, the earlier in the lower half; steps in fp32, and zero points uint8, both
        [out, groups].
        """
        scheme, (size, width) = self._scheme, self.shape(name)
        words = _bytes_of(self._part(name, _FIRST[scheme.layout], 2))  # [., ., 4]
        match scheme.layout:
            case "gptq":
                pairs = words.transpose(0, 1).reshape(size, -1)
                self._check_order(name, "g_idx", width)
            case "awq":
                codes = _nibbles(words)[..., _AWQ].flatten(1).T.contiguous()
                pairs = codes[:, 0::2] | codes[:, 1::2] << 4
            case _:
                pairs = words.flatten(1)
                self._check_order(name, "weight_g_idx", width)
        steps = self._scales(name, "weight_scale" if scheme.layout == "packed" else "scales", 2)
        steps = steps if scheme.layout == "packed" else steps.T.contiguous()
        if steps.shape != (size, -(-width // (scheme.group or width))) or width % steps.shape[1]:
            shape, of = list(steps.shape), f"[{size}, {width}]"
            raise ModelError(
                f"{name} is a matrix {of} with scales {shape}, which aren't one a group of {scheme.group}."
            )
        zeros = self._zeros(name)
        if zeros.shape != steps.shape:
            raise ModelError(f"{name} has scales {list(steps.shape)} and zero points {list(zeros.shape)}.")
        return pairs, steps, zeros

    def _zeros(self, name: str) -> Tensor:
        """Zero points [out, groups] uint8."""
        scheme = self._scheme
        if scheme.layout == "packed":
            if scheme.symmetric:
                return torch.full_like(self._part(name, "weight_scale", 2), 8, dtype=torch.uint8)
            stored = _nibbles(_bytes_of(self._part(name, "weight_zero_point", 2)))  # [out / 8, groups, 8]
            return stored.transpose(1, 2).flatten(0, 1)
        stored = _nibbles(_bytes_of(self._part(name, "qzeros", 2)))  # [groups, out / 8, 8]
        if scheme.layout == "awq":
            stored = stored[..., _AWQ]
        return stored.flatten(1).T + scheme.zero_offset

    def _check_order(self, name: str, part: str, width: int) -> None:
        if (full := _part_of(name, part)) not in self._sources:
            return
        if not torch.equal(self._part(name, part).long(), torch.arange(width) // (self._scheme.group or width)):
            raise ModelError(
                f"{full} says that columns were reordered before they were quantized (desc_act, actorder), which isn't "
                "supported: take the model quantized without that, or as a GGUF file."
            )

    def _with_zeros(self, name: str, columns: int) -> Tensor:
        """Rows of blocks of so many columns, as `kernels/blocks.h` reads them: step, zero point, codes in pairs."""
        pairs, steps, zeros = self._read(name)
        size, count = len(pairs), pairs.shape[1] * 2 // columns
        made = torch.empty(size, count, 5 + columns // 2, dtype=torch.uint8)
        repeat = count // steps.shape[1]
        made[..., :4] = steps.repeat_interleave(repeat, 1).view(torch.uint8).view(size, count, 4)
        made[..., 4] = zeros.repeat_interleave(repeat, 1)
        made[..., 5:] = pairs.view(size, count, -1)
        return made.flatten(1)

    def _like_q4_0(self, name: str) -> Tensor:
        """Rows of Q4_0's blocks: 32 columns, of which the lower halves of bytes are the first 16."""
        pairs, steps, _ = self._read(name)
        size, count = len(pairs), pairs.shape[1] // 16
        codes = _nibbles(pairs).view(size, count, 32)
        halves = steps.repeat_interleave(count // steps.shape[1], 1).half().view(torch.uint8).view(size, count, 2)
        return torch.cat((halves, codes[..., :16] | codes[..., 16:] << 4), -1).flatten(1)


def _part_of(name: str, part: str) -> str:
    return f"{name.removesuffix('.weight')}.{part}"


def _bytes_of(words: Tensor) -> Tensor:
    """int32 [a, b] as bytes [a, b, 4], the lowest first."""
    if words.dtype != torch.int32:
        raise ModelError(
            f"Codes of 4 bits should stand in int32, and stand in {str(words.dtype).removeprefix('torch.')}."
        )
    return words.contiguous().view(torch.uint8).view(*words.shape, 4)


def _nibbles(pairs: Tensor) -> Tensor:
    """Bytes [..., n] as codes [..., 2n], the lower half first."""
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
