"""The memory that a checkpoint's weights will take, computed from the files' headers.

Takes a checkpoint and its config, gives bytes; no weight is read. The decoder itself is built, from tensors without
values: shapes are checked as in loading, and tensors that loading joins or converts count as copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.reads import Reads
from longspec.model.weights.read import Weights
from longspec.model.weights.valueless import DEQUANTIZED, Valueless

__all__ = ["Footprint", "estimated", "footprint", "parameters", "shapes_of"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. On a CPU the pages of a mapped file are resident once they are read, and all of them are read."""

    weights: int  # the decoder's tensors, resident or mapped
    resident: int  # host memory while the model runs on a CPU
    loading: int  # peak of host memory during loading
    layers: tuple[int, ...] = ()  # of each layer's matrices, which may stay on disk; none where that isn't known
    experts: tuple[int, ...] = ()  # of each expert's of all layers, beside these
    largest: int = 0  # beside what is kept, while one matrix is loaded
    passes: Reads | None = None  # of those in memory, what a pass reads; None where files don't say

    @property
    def reads(self) -> Reads:
        """What a pass reads; all weights where that isn't known."""
        return self.passes or Reads(self.weights)


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
            return Footprint(whole, whole, max(whole, file.nbytes + DEQUANTIZED * max(sizes)))
        weights: Weights = Weights.of_folder(place, dtype)
    else:
        weights = checkpoint.weights(dtype, coded=coded is not None)
    valueless, decoder = shapes_of(checkpoint, weights, config, coded)
    dequantizes = valueless.dequantizes
    mapped, copied = sum(valueless.mapped.values()), valueless.copied
    gaps = copied // 12 if dequantizes and coded is None else 0  # heap fragmentation that dequantizing leaves
    resident = copied + gaps + (mapped if valueless.viewed else 0)
    loading = max(valueless.peak, (0 if valueless.releases else mapped) + copied) + gaps
    units = valueless.sizes.items()
    layers = tuple(nbytes for unit, nbytes in units if isinstance(unit, int))
    experts = tuple(nbytes for unit, nbytes in units if not isinstance(unit, int))
    passes = Reads.of(decoder.touched, config.mixture)
    return Footprint(decoder.nbytes, resident, loading, layers, experts, valueless.largest, passes)


def shapes_of(checkpoint: Checkpoint, weights: Weights, config: Config, coded: str | None) -> tuple[Valueless, Decoder]:
    """The checkpoint's weights without values, and a decoder that has taken all of them that it needs."""
    dequantizes = checkpoint.gguf is not None and (coded is not None or checkpoint.folder is None)
    shapes = Valueless(weights, dequantizes=dequantizes, releases=coded is not None)
    return shapes, Decoder(config, shapes, torch.device("meta"), coded=coded)


def estimated(config: Config, nbytes: int, *, tied: bool) -> Reads:
    """What a pass reads of so many bytes of weights, where nothing but the config is known."""
    each = nbytes / parameters(config, tied=tied)
    nbytes -= 0 if tied else round(config.vocabulary * config.width * each)
    if (own := config.per_layer) is not None:  # a row of its table is read
        nbytes -= round(own.inputs * config.layers * own.table * each)
    if (mixture := config.mixture) is None:
        return Reads(nbytes)
    expert = sum(mixture.layers) * 3 * config.width * mixture.width * each
    return Reads(nbytes - round(expert * mixture.experts), expert, mixture)


def parameters(config: Config, *, tied: bool) -> int:
    """The number of parameters of such a decoder, without biases and norms within a layer, which are at most a
    thousandth.
    """
    each = [config.head_channels(i) + 3 * config.channels(i, active=False) for i in range(config.group)]
    own = 0 if config.per_layer is None else config.per_layer.inputs * config.layers  # of per-layer embeddings
    table = 0 if config.per_layer is None else config.per_layer.table
    layers = config.width * (sum(each) + 3 * own) + table * own
    return layers + config.vocabulary * config.width * (1 if tied else 2)
