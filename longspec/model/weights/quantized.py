"""Coded weights: quantized matrices in the layout that the C kernels read, and linear layers of them.

Takes a file's blocks as they are, or values to quantize; gives layers for `layer.c`. Every format keeps a file's
values exactly (`kernels/formats.h`): nothing is quantized twice, and memory stays within a twentieth of the file's
bytes (Q2_K: a fifth). Matrices of different formats that are read as one stay what they are.

Activations are quantized to 8 bits, each 32 columns by their absolute maximum, as in llama.cpp. Outliers (a hundred
times the others in some channels: LLM.int8(), 2208.07339) then cost only their own group accuracy; nothing is
calibrated. Perplexity of the default model on three texts of 3,000 tokens, relative to bf16: +0.2%, +0.2%, -0.2%.
(With one scale per output channel and one per row it was +4.6%, with smoothed channels +0.7%.)

Sums over a group are exact integers and groups are summed in a fixed order: a row's bits don't depend on the other
rows.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from longspec.errors import ModelError
from longspec.kernels.boundary import pointer
from longspec.kernels.build import library
from longspec.kernels.team import team
from longspec.machine.system import has_large_pages

__all__ = [
    "FORMATS",
    "FP8",
    "GROUP",
    "SOURCE",
    "STRIP",
    "Blocks",
    "CodedLinear",
    "Piece",
    "Room",
    "missing_kernel",
    "tile_nbytes",
]

GROUP = 32
"""Columns whose activations share a scale."""

STRIP = 16
"""Outputs whose codes the kernel reads together."""

# As formats.h numbers them:
_NAMES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 INT4_32 INT4_128"
FORMATS = {name: number for number, name in enumerate(_NAMES.split(), 1)}
"""Formats of codes by the names that GGUF files give them, or of 4 bits with zero points, and their numbers in C."""

FP8 = "FP8"
"""e4m3 with a scale for each 128 columns of an output: no codes, as the rows stay in bf16."""

_NUMBERS = FORMATS | {FP8: len(FORMATS) + 1}

SOURCE = 32 << 20
"""Bytes of a file that are in memory at once while a matrix is put into tiles, where its rows stay in their order."""

_CHUNK = 128 << 20  # bytes of a room's parts


@dataclass(frozen=True, slots=True)
class Blocks:
    """A file's own codes of a matrix [size, width], which are read when they are asked for."""

    format: str  # a key of FORMATS, or FP8
    size: int
    width: int
    read: Callable[[], Tensor]  # rows of blocks [size, bytes] uint8
    heads: int = 0  # whose rows stand in pairs, as llama.cpp rotates them

    @property
    def nbytes(self) -> int:
        return self.size * int(_kernel().row_bytes(_NUMBERS[self.format], self.width))


class Room:
    """Memory for coded matrices, in large pages where the system has them.

    Large pages save TLB misses in repeated reads: on two cores of a virtual machine with AMX, the default model's
    codes were read in 2.2 ms instead of 2.7 to 4.0. What isn't taken is never touched, and so takes no memory.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)
        self._large = has_large_pages()

    def take(self, nbytes: int) -> Tensor:
        """`nbytes` bytes, aligned to a cache line."""
        padded = -(-nbytes // 64) * 64
        if len(self._free) < padded:
            buffer = mmap.mmap(-1, max(_CHUNK, padded), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if self._large:
                buffer.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(buffer, dtype=torch.uint8)
        taken, self._free = self._free[:nbytes], self._free[padded:]
        return taken


@dataclass(frozen=True, slots=True)
class Piece:
    """A matrix [size, width] of one format. tiles: uint8, [size / 16, bytes of a tile]."""

    format: str
    tiles: Tensor
    width: int

    @property
    def size(self) -> int:
        return len(self.tiles) * STRIP

    @property
    def number(self) -> int:
        """The format's, in C."""
        return _NUMBERS[self.format]

    @classmethod
    def of_blocks(
        cls,
        kind: str,
        matrices: Sequence[tuple[Tensor, int]],
        width: int,
        room: Room | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> Piece:
        """Matrices of a file, one below the other: each its rows of blocks [out, bytes] uint8, and the number of
        heads whose rows stand in pairs, as llama.cpp rotates them (0 for none), and are put in halves here. release: is
        called whenever `SOURCE` bytes were read, to let go of them.
        """
        made = cls._empty(kind, [len(rows) for rows, _ in matrices], width, room)
        at, kernel, number = 0, _kernel(), _NUMBERS[kind]
        nbytes = kernel.row_bytes(number, width)
        for rows, heads in matrices:
            some = len(rows) if heads else max(STRIP, SOURCE // nbytes // STRIP * STRIP)
            for strip in torch.split(rows, some):
                source = pointer(strip, torch.uint8, len(strip), nbytes)
                kernel.pack(number, source, len(strip), width, heads, made.tiles[at:].data_ptr(), *team())
                at += len(strip) // STRIP
                release()
        return made

    @classmethod
    def of_values(cls, weight: Tensor, kind: str = "Q8_0", room: Room | None = None) -> Piece:
        """Quantize weight [out, in] to Q8_0, whose error is at most 1/254 of a group's absolute maximum, or to Q4_0,
        with the steps of the least squared error.
        """
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            weight = weight.float()
        weight = weight.contiguous()
        made = cls._empty(kind, [len(weight)], weight.shape[1], room)
        source = (pointer(weight, weight.dtype, *weight.shape), weight.itemsize, weight.dtype == torch.float16)
        _kernel().quantize(FORMATS[kind], *source, *weight.shape, made.tiles.data_ptr(), *team())
        return made

    @classmethod
    def _empty(cls, kind: str, sizes: Sequence[int], width: int, room: Room | None) -> Piece:
        if any(size % STRIP for size in sizes) or width % GROUP:
            shapes = ", ".join(f"{size} x {width}" for size in sizes)
            raise ModelError(f"Matrices of {shapes} can't be coded: outputs go by {STRIP}, columns by {GROUP}.")
        count, nbytes = sum(sizes) // STRIP, tile_nbytes(kind, width)
        return cls(kind, (room or Room()).take(count * nbytes).view(count, nbytes), width)

    def values(self, rows: Tensor | None = None) -> Tensor:
        """The dequantized matrix [size, width] in fp32, or the rows of these indices.

        Raises:
            IndexError: an index is out of range.
        """
        rows = torch.arange(self.size) if rows is None else rows.contiguous()
        made, kernel, number = torch.empty(len(rows), self.width), _kernel(), self.number
        tiles = pointer(self.tiles, torch.uint8, self.size // STRIP, kernel.tile_bytes(number, self.width))
        chosen = pointer(rows, torch.int64, None)
        wrong = kernel.values(number, tiles, self.size, self.width, chosen, len(rows), made.data_ptr(), *team())
        if wrong >= 0:
            raise IndexError(f"there is no row {int(rows[wrong])} among {self.size}")
        return made


class CodedLinear:
    """y = x W^T + b with coded W, for x [r, in]: the tensors of the C kernel, and the definition in torch."""

    def __init__(self, pieces: Sequence[Piece], bias: Tensor | None = None) -> None:
        """pieces: one below the other, all of one width; of FP8 all of them are, or none."""
        self.pieces, self.bias = tuple(pieces), bias
        self.chain: list[ctypes.Structure] = []  # the kernel's structs, which point to each other
        self.size, self.width = sum(piece.size for piece in pieces), pieces[0].width

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.width

    @property
    def tensors(self) -> list[Tensor]:
        return [*(piece.tiles for piece in self.pieces), *([] if self.bias is None else [self.bias])]

    def values(self) -> Tensor:
        """The dequantized matrix [out, in] in fp32."""
        return torch.cat([piece.values() for piece in self.pieces])

    def rows(self, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        """The dequantized rows of these indices [...], as [..., in]: a table's look-up."""
        if len(self.pieces) > 1:
            return torch.nn.functional.embedding(chosen, self.values()).to(dtype)
        return self.pieces[0].values(chosen.flatten()).to(dtype).view(*chosen.shape, self.width)

    def __call__(self, rows: Tensor) -> Tensor:
        coded = rows if self.pieces[0].format == FP8 else self._coded(rows)
        made = coded.double() @ self.values().double().T
        made = made if self.bias is None else made + self.bias.double()
        return made.to(rows.dtype)

    @staticmethod
    def _coded(rows: Tensor) -> Tensor:
        """What the rows' codes stand for."""
        groups = rows.float().view(len(rows), -1, GROUP)
        largest = groups.abs().amax(2, keepdim=True)
        # `127 / largest` would be a reciprocal times 127, which rounds twice.
        factor = torch.where(largest > 0, torch.full_like(largest, 127).div(largest), 0.0)
        return ((groups * factor).round() * (largest / 127)).flatten(1)


def tile_nbytes(kind: str, width: int) -> int:
    """Bytes of 16 outputs of a format."""
    return int(_kernel().tile_bytes(_NUMBERS[kind], width))


def missing_kernel() -> str | None:
    """The reason why matrices can't be coded here; None where they can."""
    found = _library()
    return found if isinstance(found, str) else None


def _kernel() -> ctypes.CDLL:
    found = _library()
    if isinstance(found, str):
        raise ModelError(f"Coded weights can't be had here: {found}.")
    return found


def _library() -> ctypes.CDLL | str:
    found = library("codes.c")
    return found if isinstance(found, str) else _declared(found)


@cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    place, number = ctypes.c_void_p, ctypes.c_int64
    found.tile_bytes.argtypes, found.tile_bytes.restype = (number, number), number
    found.row_bytes.argtypes, found.row_bytes.restype = (number, number), number
    found.pack.argtypes = (number, place, number, number, number, place, place, number)
    found.quantize.argtypes = (number, place, number, number, number, number, place, place, number)
    found.values.argtypes = (number, place, number, number, place, number, place, place, number)
    found.values.restype = number
    return found
