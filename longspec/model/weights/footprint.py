"""The memory that a checkpoint's weights will take, computed from the files' headers.

Takes a checkpoint and its config, gives bytes; no weight is read. The decoder itself is built, from tensors without
values: shapes are checked as in loading, and tensors that loading joins or converts count as copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.weights.quantized import STRIP, CodedLinear, Piece, tile_nbytes
from longspec.model.weights.read import Weights, check_matrices, check_values
from longspec.model.weights.safetensors import Shard

__all__ = ["Footprint", "footprint", "parameters"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. On a CPU the pages of a mapped file are resident once they are read, and all of them are read."""

    weights: int  # the decoder's tensors, resident or mapped
    resident: int  # host memory while the model runs on a CPU
    loading: int  # peak of host memory during loading


def footprint(checkpoint: Checkpoint, config: Config, dtype: torch.dtype, coded: str | None = None) -> Footprint:
    """The weights' bytes, in `dtype` or coded (as `Decoder` takes them). Raises ModelError where loading would: a file
    is damaged, a tensor is missing or of another shape.
    """
    if checkpoint.folder is not None and checkpoint.gguf is not None and coded is None:
        from longspec.model.files.convert import place_of

        place = place_of(checkpoint.folder, dtype)
        if not place.is_dir():  # will be converted, tensor by tensor
            from longspec.model.gguf.file import read_gguf

            file = read_gguf(checkpoint.gguf)
            sizes = [prod(file.shape(name)) for name in file.names]
            whole = sum(sizes) * dtype.itemsize
            return Footprint(whole, whole, max(whole, file.nbytes + _DEQUANTIZED * max(sizes)))
        weights: Weights = Weights.of_folder(place, dtype)
    else:
        weights = checkpoint.weights(dtype, coded=coded is not None)
    dequantizes = checkpoint.gguf is not None and (coded is not None or checkpoint.folder is None)
    valueless = _Valueless(weights, gguf=dequantizes, releases=coded is not None)
    whole = Decoder(config, valueless, torch.device("meta"), coded=coded).nbytes
    mapped, copied = sum(valueless.mapped.values()), valueless.copied
    gaps = copied // 12 if dequantizes and coded is None else 0  # heap fragmentation that dequantizing leaves
    resident = copied + gaps + (mapped if valueless.viewed else 0)
    return Footprint(whole, resident, max(valueless.peak, (0 if valueless.releases else mapped) + copied) + gaps)


def parameters(config: Config, *, tied: bool) -> int:
    """The number of parameters of such a decoder, without biases and norms within a layer, which are at most a
    thousandth.
    """
    each = [config.head_channels(i) + 3 * config.channels(i, active=False) for i in range(config.group)]
    own = 0 if config.per_layer is None else config.per_layer.inputs * config.layers  # of per-layer embeddings
    table = 0 if config.per_layer is None else config.per_layer.table
    layers = config.width * (sum(each) + 3 * own) + table * own
    return layers + config.vocabulary * config.width * (1 if tied else 2)


_DEQUANTIZED = 9
"""Bytes per weight while a tensor is dequantized: it stands there twice in fp32 (measured: 2.3 times)."""


class _Valueless(Weights):
    """Gives tensors without values, and sums the bytes of the real ones."""

    def __init__(self, weights: Weights, *, gguf: bool, releases: bool) -> None:
        """gguf: values are dequantized. releases: the file's pages are let go of once a matrix is coded."""
        super().__init__(weights._sources, weights.dtype)
        self.releases = releases
        self.mapped: dict[str, int] = {}  # resident pages, by tensor or file
        self.copied = 0
        self.viewed = False  # some tensor keeps its file mapped
        self.peak = 0
        self._gguf = gguf

    def joined(self, names: Sequence[str]) -> Tensor:
        sources: list[Any] = [self._source(name) for name in names]
        run = None
        shapes = [source.shape(name) for source, name in zip(sources, names, strict=True)]
        if self._gguf:
            if not self.releases:
                self.mapped[""] = sources[0].nbytes
        elif all(isinstance(source, Shard) for source in sources):  # a view of the mapped file: nothing is read
            taken = [source.take(name) for source, name in zip(sources, names, strict=True)]
            check_values(names, [tensor.dtype for tensor in taken], shapes)
            self.mapped |= {name: tensor.nbytes for name, tensor in zip(names, taken, strict=True)}
            if all(source is sources[0] for source in sources):
                run = sources[0].take_run(names)
        made = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=self.dtype, device="meta")
        if run is not None and run.dtype == self.dtype:
            self.viewed = True
        else:
            self.copied += made.nbytes
            largest = max(prod(shape) for shape in shapes) * (_DEQUANTIZED if self._gguf else self.dtype.itemsize)
            self.peak = max(self.peak, sum(self.mapped.values()) + self.copied + largest)
        return made

    def exact(self, name: str) -> Tensor:
        tensor = super().exact(name)
        self.copied += tensor.nbytes  # or a page of the file: these are small
        return tensor

    def coded(self, names: Sequence[str], kind: str, bias: Tensor | None = None) -> CodedLinear:
        pieces = []
        for run, found in self._runs(names):
            first = found[0]
            if first is not None:
                form, width, size = first.format, first.width, sum(each.size for each in found if each is not None)
                read = sum(each.nbytes for each in found if each is not None)
            else:
                shapes = [self._source(name).shape(name) for name in run]
                check_matrices(run, shapes)
                form, width, size = kind, shapes[0][1], sum(shape[0] for shape in shapes)
                read = 2 * size * width * (4 if self._gguf else self.dtype.itemsize)  # joined, it stands there twice
            tiles = torch.empty(size // STRIP, tile_nbytes(form, width), dtype=torch.uint8, device="meta")
            pieces.append(Piece(form, tiles, width))
            self.copied += tiles.nbytes
            self.peak = max(self.peak, self.copied + read)
        return CodedLinear(pieces, bias)
