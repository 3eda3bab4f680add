"""Weights that stay on disk: each layer's matrices are read into a ring of buffers while the pass comes near them.

Takes a checkpoint's weights; gives them with the layers' matrices in buffers (`ring.py`), and everything else (tables,
norms, biases, routers) in memory. A decoder reads such weights as any others, and holds a layer while it computes it.

What is read is a file of our own beside the model's, in the user's cache, with every matrix as the products want it.
A file of codes can't be multiplied as it is: 16 outputs stand together, and putting them so (`kernels/codes.c`) takes
longer than a disk takes to read them. The file is made once, with one matrix in memory at a time, and is bound to what
it was made of; each layer has its sum.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.errors import ModelError
from longspec.kernels import build
from longspec.machine.files import read_json
from longspec.machine.schema import check, listed, whole
from longspec.model.files.store import Report, models_folder, need_room, workspace
from longspec.model.weights.pool import Pool
from longspec.model.weights.quantized import CodedLinear, Piece
from longspec.model.weights.read import Weights
from longspec.model.weights.ring import Ring
from longspec.model.weights.unit_file import Key, Unit, UnitFile
from longspec.model.weights.valueless import LINE, PAGE, Valueless, padded, parts

__all__ = ["BUFFERS", "Streamed", "spread"]

BUFFERS = 3
"""Of the ring: one is in use, one is ready, and one is read into, so that neither side waits for a larger layer."""

_SOURCES = ("codes.c", "blocks.h", "formats.h", "float8.h")
"""What says how tiles lie."""

_MOST_NBYTES = 1 << 20  # of the file of sums
_FIELDS = {"sums": listed(whole(0, (1 << 32) - 1), 1 << 16)}


class Streamed(Weights):
    """Weights whose layers stand in `ring` while they are held. The numbers of its units are the layers'."""

    def __init__(self, weights: Weights, shapes: Valueless, kept: int, pool: int, report: Report) -> None:
        """shapes: has gone through a whole decoder. kept: the number of layers that stay in memory. pool: bytes that
        experts may take there.

        Raises:
            ModelError: a file can't be read, or written to the cache.
        """
        super().__init__(weights._sources, weights.dtype)
        folder = _arranged(weights, shapes, report)
        sums = read_json(folder / "sums.json", _MOST_NBYTES, "The file of sums", error=ModelError)
        check(str(folder / "sums.json"), sums, _FIELDS, ModelError)
        sizes = shapes.sizes
        if len(sums["sums"]) != len(sizes):
            raise ModelError(f"{folder / 'sums.json'} isn't of {len(sizes):,} units: remove {folder}.")
        each = zip(sizes, accumulate(sizes.values(), initial=0), sizes.values(), sums["sums"], strict=False)
        file = UnitFile(folder / "layers", {unit: Unit(*place) for unit, *place in each})
        layers = [unit for unit in sizes if isinstance(unit, int)]
        self.ring = self._layers = Ring(file, layers, [layers[i] for i in spread(kept, len(layers))], BUFFERS)
        self._experts = Pool(file, pool)
        self.pool = self._experts if len(layers) < len(sizes) else None
        self._places = {
            names: (unit, at, made) for unit, held in shapes.units.items() for names, at, made in _placed(held)
        }

    def joined(self, names: Sequence[str]) -> Tensor:
        if (place := self._places.get(tuple(names))) is None:
            return super().joined(names)
        (tensor,) = self._views(*place)
        return tensor

    def coded(self, names: Sequence[str], kind: str, bias: Tensor | None = None) -> CodedLinear:
        if (place := self._places.get(tuple(names))) is None:
            return super().coded(names, kind, bias)
        pieces = zip(place[2].pieces, self._views(*place), strict=True)
        return CodedLinear([Piece(piece.format, tiles, piece.width) for piece, tiles in pieces], bias)

    def _views(self, unit: Key, at: int, made: Any) -> Iterator[Tensor]:
        """Views of a unit's room like the parts of a matrix without values."""
        room = self._layers.room(unit) if isinstance(unit, int) else self._experts.room(unit)
        for part in parts(made):
            yield room[at : at + part.nbytes].view(part.dtype).view(part.shape)
            at += padded(part.nbytes, LINE)


def spread(kept: int, layers: int) -> list[int]:
    """So many of the layers, evenly spread: while one of them computes, the disk reads on."""
    return [i for i in range(layers) if (i + 1) * kept // layers > i * kept // layers]


def _placed(held: Mapping[tuple[str, ...], Any]) -> Iterator[tuple[tuple[str, ...], int, Any]]:
    """A layer's matrices, and at which byte each begins."""
    at = 0
    for names, made in held.items():
        yield names, at, made
        at += sum(padded(part.nbytes, LINE) for part in parts(made))


def _arranged(weights: Weights, shapes: Valueless, report: Report) -> Path:
    """The folder of the layers' matrices as the products read them, which is made where there is none."""
    target, size = models_folder() / "arranged" / _key(weights, shapes), sum(shapes.sizes.values())
    if _is_whole(target, size):
        return target
    with workspace(target, report) as temporary:
        if not _is_whole(target, size):  # another process may have made it in the meantime
            shutil.rmtree(target, ignore_errors=True)
            need_room(temporary, size)
            made = temporary / target.name
            made.mkdir()
            with (made / "layers").open("wb") as file:
                sums = [_write(file, weights, shapes, unit, report) for unit in shapes.units]
                file.flush()
                os.fsync(file.fileno())
            (made / "sums.json").write_text(json.dumps({"sums": sums}), encoding="ascii")
            made.rename(target)
    return target


def _is_whole(folder: Path, size: int) -> bool:
    """Whether its file is there, and nobody has cut it short."""
    file = folder / "layers"
    return file.is_file() and file.stat().st_size == size


def _write(file: Any, weights: Weights, shapes: Valueless, unit: Key, report: Report) -> int:
    """Write a unit's matrices, one in memory at a time; gives the sum of all its bytes."""
    report("arranging the layers to be read from disk", file.tell() >> 20, sum(shapes.sizes.values()) >> 20)
    crc = 0
    for names, made in shapes.units[unit].items():
        single = Weights(weights._sources, weights.dtype)  # with room of its own, which ends with the matrix
        real = single.coded(names, shapes.kinds[names]) if isinstance(made, CodedLinear) else single.joined(names)
        for part in parts(real):
            data: Any = part.contiguous().view(torch.uint8).numpy()
            crc = _put(file, memoryview(data).cast("B"), LINE, crc)
        for name in () if isinstance(made, CodedLinear) else names:
            single.release(name)
    return _put(file, memoryview(b""), PAGE, crc)


def _put(file: Any, data: memoryview, to: int, crc: int) -> int:
    """Write bytes, and zeros up to a multiple of `to`."""
    file.write(data)
    gap = bytes(-file.tell() % to)
    file.write(gap)
    return zlib.crc32(gap, zlib.crc32(data, crc))


def _key(weights: Weights, shapes: Valueless) -> str:
    """A hash of the files, of what lies where, and of how tiles lie."""
    files = sorted({file.resolve() for source in weights._sources.values() for file in _files(source.path)})
    stamps = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    lies = [
        (names, [(str(part.dtype), *part.shape) for part in parts(made)])
        for held in shapes.units.values()
        for names, made in held.items()
    ]
    digest = hashlib.sha256(repr((stamps, lies, sorted(shapes.kinds.values()))).encode())
    for name in _SOURCES:
        digest.update((Path(build.__file__).parent / name).read_bytes())
    return digest.hexdigest()[:20]


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
