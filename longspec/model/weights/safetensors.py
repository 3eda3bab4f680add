"""One safetensors file: read through a memory map, or written as a stream of tensors.

Takes a path; gives tensors that are views of the file. Knows nothing of models, folders or precisions.

The reader is our own because the safetensors package gives each tensor a storage of its own, so matrices that are
adjacent in the file (a layer's q, k and v) can't be read as one without a copy. Here the whole file is one uint8
tensor over a private copy-on-write map, and each tensor, or run of tensors, is a slice of it viewed as its dtype.

The file is eight bytes of header length, a JSON header of byte ranges, and the bytes. The header isn't trusted: it is
checked against the size of the file before a tensor can be taken.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from longspec.errors import LongspecError, ModelError
from longspec.machine.files import opened, parse_json, replaced
from longspec.machine.schema import shown
from longspec.machine.system import available_bytes, has_large_pages

__all__ = ["Shard", "save_described", "write_shard"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes, the format's own limit, whose JSON may take 2.5 GB
_MOST_HEADER_NBYTES = 16 << 20  # that are read; 100,000 tensors take 12 MB
_LEAST_READ = 16 << 20  # bytes
_ALIGNMENT = 64  # bytes, a cache line: the alignment of tensors in a file that we write


@dataclass(frozen=True, slots=True)
class _Span:
    """A tensor's byte range [begin, end) in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Shard:
    """The tensors of one safetensors file, by name. Taking one reads nothing until its values are used."""

    def __init__(self, path: Path) -> None:
        """Open a file. Raises ModelError where it can't be read, or contradicts its header."""
        self.path = path
        with opened(path, "The model's file", error=ModelError) as file:
            size = file.seek(0, 2)
            file.seek(0)
            self._spans = _read_header(path, file.read(8), file.read, size)
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._map: mmap.mmap | None = buffer
        self._bytes = torch.frombuffer(buffer, dtype=torch.uint8)  # [size of the file]
        self._size = size

    @property
    def names(self) -> list[str]:
        return list(self._spans)

    def dtype(self, name: str) -> torch.dtype:
        return self._spans[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._spans[name].shape

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {span.dtype for span in self._spans.values()}

    def read(self) -> bool:
        """Copy the file into the process's own memory, in large pages; from here on tensors are views of that.

        Large pages save TLB misses in repeated reads: on two cores of a virtual machine with AMX, the default model's
        codes were read in 2.2 ms instead of 2.7 to 4.0, twice as many bytes in 4.5 instead of 7.5 to 8.7. Nothing
        happens where the system has no large pages, the file is too small for them, or it would take more than half
        of the available memory: a mapped file's pages can be evicted. Returns whether it was copied.

        Raises:
            ModelError: the file can't be read.
        """
        if not _LEAST_READ <= self._size <= available_bytes() // 2 or not has_large_pages():
            return False
        buffer = mmap.mmap(-1, self._size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer.madvise(mmap.MADV_HUGEPAGE)
        try:
            with self.path.open("rb", buffering=0) as file, memoryview(buffer) as room:
                done = 0
                while count := file.readinto(room[done:]):
                    done += count
        except OSError as error:
            raise ModelError(f"{self.path} can't be read: {error.strerror or error}.") from error
        if done != self._size:
            raise ModelError(f"{self.path} has {done:,} bytes, and had {self._size:,} before: it is being changed.")
        self._bytes, self._map = torch.frombuffer(buffer, dtype=torch.uint8), None
        return True

    def split(self, name: str, parts: Sequence[str]) -> None:
        """Name the equal parts along dimension 0 of a tensor, of as many as that has, instead of the whole."""
        whole = self._spans.pop(name)
        nbytes = (whole.end - whole.begin) // len(parts)
        for i, part in enumerate(parts):
            begin = whole.begin + i * nbytes
            self._spans[part] = _Span(whole.dtype, whole.shape[1:], begin, begin + nbytes)

    def take(self, name: str) -> Tensor:
        """The tensor, as a view of the file."""
        span = self._spans[name]
        return self._view(span.dtype, span.shape, span.begin, span.end)

    def take_run(self, names: Sequence[str]) -> Tensor | None:
        """The tensors concatenated along dimension 0 as one view; None where they aren't adjacent."""
        spans = [self._spans[name] for name in names]
        first, last = spans[0], spans[-1]
        rest = first.shape[1:]
        if not first.shape or any(span.dtype != first.dtype or span.shape[1:] != rest for span in spans):
            return None
        if any(left.end != right.begin for left, right in pairwise(spans)):
            return None
        return self._view(first.dtype, (sum(span.shape[0] for span in spans), *rest), first.begin, last.end)

    def blocks(self, name: str) -> None:
        """None: the tensors are values."""

    def release(self, name: str) -> None:
        """Let go of a tensor's pages of the mapped file, which are read again where it is used again."""
        if self._map is None:
            return
        span = self._spans[name]
        begin, end = -(-span.begin // mmap.PAGESIZE) * mmap.PAGESIZE, span.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _view(self, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> Tensor:
        chunk = self._bytes[begin:end]
        if begin % dtype.itemsize:
            chunk = chunk.clone()  # an unaligned tensor: the format allows it, a view of another dtype doesn't
        return chunk.view(dtype).view(shape)


def write_shard(
    path: Path, entries: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype, take: Callable[[str], Tensor]
) -> None:
    """Write the named tensors in this order, converted to `dtype`, holding one at a time.

    The header needs every shape before the first tensor is made; `take(name)` must give a tensor of that shape.

    Raises:
        ModelError: a tensor has another shape.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in entries:
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, shape in entries:
            tensor = take(name).to(dtype).contiguous()
            if tensor.shape != shape:
                raise ModelError(f"The tensor {name} is {list(tensor.shape)}, and its file says {list(shape)}.")
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def _read_header(path: Path, prefix: bytes, read: Callable[[int], bytes], size: int) -> dict[str, _Span]:
    def bad(what: str) -> NoReturn:
        raise ModelError(f"{path} isn't a usable safetensors file: {what}. Fetch it again.")

    if len(prefix) < 8:
        bad(f"expected at least 8 bytes, found {size:,}")
    length = struct.unpack("<Q", prefix)[0]
    if length > _HEADER_LIMIT:
        bad(f"its header says {length:,} bytes, more than the {_HEADER_LIMIT:,} that the format allows")
    if length > _MOST_HEADER_NBYTES:
        bad(f"its header says {length:,} bytes, more than the {_MOST_HEADER_NBYTES >> 20} MiB that are read")
    if 8 + length > size:
        bad(f"expected {8 + length:,} bytes up to the end of the header, found {size:,}")
    try:
        header = parse_json(read(length), unique=True)
    except ValueError as error:
        bad(f"its header can't be parsed ({error})")
    if not isinstance(header, dict):
        bad("its header isn't a JSON object")
    header.pop("__metadata__", None)

    spans: dict[str, _Span] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            bad(f"the header's entry for {name!r} lacks a dtype, a shape or offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = _DTYPES.get(code) if isinstance(code, str) else None
        if dtype is None:
            bad(f"{name!r} has the dtype {shown(code)}, which isn't one of {', '.join(_DTYPES)}")
        if not _are_sizes(shape) or prod(size or 1 for size in shape) > 1 << 62:  # more than torch counts
            bad(f"{name!r} has the shape {shown(shape)}")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            bad(f"{name!r} has the offsets {shown(offsets)}")
        needed, found = prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
        if needed != found:
            bad(f"{name!r} needs {needed:,} bytes for its shape {shape} and has {found:,}")
        spans[name] = _Span(dtype, tuple(shape), 8 + length + offsets[0], 8 + length + offsets[1])
    expected = max((span.end for span in spans.values()), default=8 + length)
    if expected != size:
        bad(f"expected {expected:,} bytes, found {size:,}")
    return spans


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and n >= 0 for n in value)


def save_described(weights: Path, tensors: Mapping[str, Tensor], about: Path, said: Mapping[str, Any]) -> None:
    """Write a few tensors and their description, as JSON, into a folder, each atomically, the description last.

    Raises:
        LongspecError: they can't be written.
    """
    from safetensors.torch import save_file

    held = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    try:
        weights.parent.mkdir(parents=True, exist_ok=True)
        replaced(weights, lambda path: save_file(held, path, {"format": "pt"}))
        replaced(about, lambda path: path.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8"))
    except OSError as error:
        folder, why = weights.parent, error.strerror or error
        raise LongspecError(f"{folder} can't be written: {why}; name another folder.") from error
