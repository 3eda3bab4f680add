"""Weights without values: what a decoder would read, by the files' headers alone.

Takes a checkpoint's weights; gives tensors of their shapes on torch's device `meta`, and sums up what the real ones
take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from longspec.model.weights.quantized import SOURCE, STRIP, CodedLinear, Piece, tile_nbytes
from longspec.model.weights.read import Weights, check_matrices, check_values
from longspec.model.weights.safetensors import Shard
from longspec.model.weights.unit_file import Key

__all__ = ["DEQUANTIZED", "LINE", "PAGE", "Valueless", "padded", "parts"]

DEQUANTIZED = 9
"""Bytes per weight while a tensor is dequantized: it stands there twice in fp32 (measured: 2.3 times)."""

LINE, PAGE = 64, 4096
"""Bytes: a cache line, where a matrix begins; and where a layer does, as direct reads of a file go by it."""

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.?experts\.(\d+)\.)?.+")


class Valueless(Weights):
    """Gives tensors without values, and sums the bytes of the real ones."""

    def __init__(self, weights: Weights, *, dequantizes: bool, releases: bool) -> None:
        """dequantizes: values are dequantized. releases: the file's pages are let go of once a matrix is coded."""
        super().__init__(weights._sources, weights.dtype)
        self.releases = releases
        self.mapped: dict[str, int] = {}  # resident pages, by tensor or file
        self.copied = 0
        self.viewed = False  # some tensor keeps its file mapped
        self.peak = self.largest = 0  # in all; beside what is kept, while one matrix is loaded
        # Matrices of layers, and of each of their experts apart, in order.
        self.units: dict[Key, dict[tuple[str, ...], CodedLinear | Tensor]] = {}
        self.kinds: dict[tuple[str, ...], str] = {}  # what each coded matrix's values are quantized to
        self.dequantizes = dequantizes

    @property
    def sizes(self) -> dict[Key, int]:
        """Bytes of each unit, with what aligns its matrices: each begins at a cache line, a unit at a page."""
        return {
            unit: padded(sum(padded(part.nbytes, LINE) for made in held.values() for part in parts(made)), PAGE)
            for unit, held in self.units.items()
        }

    def _noted(self, names: Sequence[str], made: Any, temporary: int) -> Any:
        """The same, which counts as its layer's where it is a matrix."""
        match = _LAYER.fullmatch(names[0])
        nbytes = sum(part.nbytes for part in parts(made))
        self.largest = max(self.largest, temporary + (nbytes if match else 0))  # a layer's stands there to be written
        if match is not None and (isinstance(made, CodedLinear) or made.dim() == 2):
            layer, expert = int(match[1]), match[2]
            self.units.setdefault(layer if expert is None else (layer, int(expert)), {})[tuple(names)] = made
        return made

    def joined(self, names: Sequence[str]) -> Tensor:
        sources: list[Any] = [self._source(name) for name in names]
        run = None
        shapes = [source.shape(name) for source, name in zip(sources, names, strict=True)]
        if self.dequantizes:
            if not self.releases:
                self.mapped[""] = sources[0].nbytes
        elif all(isinstance(source, Shard) for source in sources):  # a view of the mapped file: nothing is read
            taken = [source.take(name) for source, name in zip(sources, names, strict=True)]
            check_values(names, [tensor.dtype for tensor in taken], shapes)
            self.mapped |= {name: tensor.nbytes for name, tensor in zip(names, taken, strict=True)}
            if all(source is sources[0] for source in sources):
                run = sources[0].take_run(names)
        made = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=self.dtype, device="meta")
        largest = made.nbytes
        if run is not None and run.dtype == self.dtype:
            self.viewed = True
        else:
            self.copied += made.nbytes
            largest = max(prod(shape) for shape in shapes) * (DEQUANTIZED if self.dequantizes else self.dtype.itemsize)
            self.peak = max(self.peak, sum(self.mapped.values()) + self.copied + largest)
        kept: Tensor = self._noted(names, made, largest)
        return kept

    def exact(self, name: str) -> Tensor:
        tensor = super().exact(name)
        self.copied += tensor.nbytes  # or a page of the file: these are small
        return tensor

    def coded(self, names: Sequence[str], kind: str, bias: Tensor | None = None) -> CodedLinear:
        pieces, temporary = [], 0
        for run, found in self._runs(names):
            first = found[0]
            if first is not None:
                form, width, size = first.format, first.width, sum(each.size for each in found if each is not None)
                read = sum(
                    each.nbytes if each.heads else min(each.nbytes, SOURCE) for each in found if each is not None
                )
            else:
                shapes = [self._source(name).shape(name) for name in run]
                check_matrices(run, shapes)
                form, width, size = kind, shapes[0][1], sum(shape[0] for shape in shapes)
                each_nbytes = 4 if self.dequantizes else self.dtype.itemsize
                read = 2 * size * width * each_nbytes  # joined, it stands there twice
            tiles = torch.empty(size // STRIP, tile_nbytes(form, width), dtype=torch.uint8, device="meta")
            pieces.append(Piece(form, tiles, width))
            self.copied += tiles.nbytes
            self.peak, temporary = max(self.peak, self.copied + read), max(temporary, read)
        self.kinds[tuple(names)] = kind
        made: CodedLinear = self._noted(names, CodedLinear(pieces, bias), temporary)
        return made


def parts(made: CodedLinear | Tensor) -> list[Tensor]:
    """What a matrix is held in."""
    return [piece.tiles for piece in made.pieces] if isinstance(made, CodedLinear) else [made]


def padded(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to
