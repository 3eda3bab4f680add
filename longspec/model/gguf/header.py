"""A GGUF file's header: its fields, and each tensor's position.

Takes a path; gives plain Python values, and byte ranges that are checked against the size of the file. Knows no
architecture and dequantizes nothing.

The gguf package's own reader trusts every length in the file (a false array length makes it loop for ever), and takes
2.3 s on the default model because each token string becomes an array; this one parses the same bytes in 0.1 s (two
cores with AMX). The package's tables of types and block sizes are used.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)

from longspec.errors import ModelError
from longspec.machine.files import opened
from longspec.machine.schema import shown

__all__ = ["GgufHeader", "GgufTensor", "is_gguf", "read_header"]

_SCALARS: dict[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
_DIMENSIONS = 4  # ggml's maximum
_MOST_HEADER_NBYTES = 64 << 20  # 256,000 tokens and 500,000 merges take 20 MB
_MOST_FIELDS, _MOST_TENSORS = 1 << 16, 1 << 18
_MOST_PARTS = 1000
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's position: `nbytes` bytes of type `kind` from `begin` on, in a mapped file. The shape is in torch's
    order, rows first.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    begin: int
    nbytes: int
    buffer: mmap.mmap

    @property
    def bytes(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Its bytes, which nobody may write to."""
        return np.frombuffer(self.buffer, np.uint8, self.nbytes, self.begin)

    def parts(self) -> list[GgufTensor]:
        """The tensors that it stacks along its first dimension."""
        count, shape = self.shape[0], self.shape[1:]
        nbytes = self.nbytes // count
        return [GgufTensor(shape, self.kind, self.begin + i * nbytes, nbytes, self.buffer) for i in range(count)]

    def release(self) -> None:
        """Let go of the pages that its bytes fill: mapped bytes count as this process's memory once read."""
        begin = -(-self.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (self.begin + self.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0:
            self.buffer.madvise(mmap.MADV_DONTNEED, begin, length)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    path: Path
    fields: dict[str, Any]  # numbers, strings, bools, and lists of them
    tensors: dict[str, GgufTensor]
    nbytes: int  # of all files

    @property
    def formats(self) -> dict[str, int]:
        """Bytes by the type's name, the largest first."""
        total: Counter[str] = Counter()
        for place in self.tensors.values():
            total[place.kind.name] += place.nbytes
        return dict(total.most_common())

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * sum(self.formats.values()) / sum(prod(place.shape) for place in self.tensors.values())


def is_gguf(path: Path) -> bool:
    """Whether the file begins as GGUF does, whatever its name is."""
    try:
        with opened(path, "The file", error=ModelError) as file:
            return file.read(4) == GGUF_MAGIC.to_bytes(4, "little")
    except ModelError:
        return False


def read_header(path: Path) -> GgufHeader:
    """Parse a header; of a model that is split into files (-00001-of-00003.gguf), given by any of them, the fields of
    the first and the tensors of all.

    Raises ModelError where a file isn't GGUF, is truncated or missing, or holds a tensor of a type that gguf doesn't
    know.
    """
    split = _PART.fullmatch(path.name)
    if split is None:
        whole = _read(path)
        if whole.fields.get("split.count") not in (None, 0, 1):
            raise ModelError(
                f"{path} is one part of a split GGUF, and its name doesn't end with -00001-of-0000N.gguf: give the "
                "parts their names back, or join them with llama-gguf-split --merge."
            )
        return whole
    stem, _, count = split.groups()
    if int(count) > _MOST_PARTS:
        raise ModelError(f"{path} is one of {int(count):,} parts; at most {_MOST_PARTS:,} were expected.")
    names = [path.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    if absent := [name.name for name in names if not name.is_file()]:
        raise ModelError(f"{path} is one of {len(names)} parts, and {absent[0]} isn't beside it.")
    parts = [_read(name) for name in names]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        if (part.fields.get("split.no"), part.fields.get("split.count")) != (number, len(parts)):
            raise ModelError(f"{part.path} doesn't say that it is part {number + 1} of {len(parts)}. Fetch it again.")
        if twice := tensors.keys() & part.tensors.keys():
            raise ModelError(f"{part.path} holds {min(twice)}, which another part holds too. Fetch it again.")
        tensors |= part.tensors
    return GgufHeader(names[0], parts[0].fields, tensors, sum(part.nbytes for part in parts))


def _read(path: Path) -> GgufHeader:
    """One file's header."""
    with opened(path, "The GGUF file", error=ModelError) as file:
        try:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:  # an empty file can't be mapped
            raise ModelError(f"{path} can't be read as GGUF: {error}.") from error
    return _Walk(path, buffer).header()


class _Walk:
    """A cursor over the header, bounds-checked against the file."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self._path = path
        self._buffer = buffer
        self._size = len(buffer)
        self._end = min(self._size, _MOST_HEADER_NBYTES)  # of what is parsed
        self._at = 0

    def header(self) -> GgufHeader:
        if self._number("<I") != GGUF_MAGIC:
            self._bad("it doesn't begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            self._bad(f"it is version {version} of the format, and 2 or 3 was expected")
        tensor_count, field_count = self._number("<Q"), self._number("<Q")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self._string()
            if name in fields:
                self._bad(f"the field {name} stands in it twice")
            fields[name] = self._value(self._number("<I"))
            if len(fields) > _MOST_FIELDS:
                self._bad(f"it has {field_count:,} fields, and at most {_MOST_FIELDS:,} were expected")
        infos = []
        for _ in range(tensor_count):
            infos.append(self._info())
            if len(infos) > _MOST_TENSORS:
                self._bad(f"it has {tensor_count:,} tensors, and at most {_MOST_TENSORS:,} were expected")

        alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            self._bad(f"its alignment is {shown(alignment)}, and a power of two from 8 on was expected")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, code, offset in infos:
            if name in tensors:
                self._bad(f"the tensor {name} stands in it twice")
            if offset % alignment:
                self._bad(f"the tensor {name} begins at {offset:,}, which isn't aligned to {alignment} bytes")
            tensors[name] = self._tensor(name, shape, code, start + offset)
        return GgufHeader(self._path, fields, tensors, self._size)

    def _tensor(self, name: str, shape: tuple[int, ...], code: int, begin: int) -> GgufTensor:
        try:
            kind = GGMLQuantizationType(code)
            block, nbytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            self._bad(f"the tensor {name} has the type {code}, which the gguf package doesn't know")
        if shape[-1] % block:
            self._bad(f"the rows of {name} hold {shape[-1]:,} values, which {kind.name} can't divide by {block}")
        size = prod(shape) // block * nbytes
        if begin + size > self._size:
            self._bad(f"expected at least {begin + size:,} bytes because of {name}, found {self._size:,}")
        return GgufTensor(shape, kind, begin, size, self._buffer)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        count = self._number("<I")
        if not 1 <= count <= _DIMENSIONS:
            self._bad(f"the tensor {name} has {count} dimensions")
        shape = tuple(self._number("<Q") for _ in range(count))[::-1]
        if 0 in shape:
            self._bad(f"the tensor {name} has the shape {list(shape)}")
        return name, shape, self._number("<I"), self._number("<Q")

    def _value(self, code: int) -> Any:
        if code == GGUFValueType.STRING:
            return self._string()
        if code != GGUFValueType.ARRAY:
            return self._numbers(code, 1)[0]
        code, count = self._number("<I"), self._number("<Q")
        if code == GGUFValueType.STRING:
            if count * 8 > self._end - self._at:  # each has a length of 8 bytes
                self._bad(f"a list of {count:,} strings doesn't fit in its {self._size:,} bytes")
            return self._strings(count)
        return self._numbers(code, count)

    def _numbers(self, code: int, count: int) -> list[Any]:
        dtype = _SCALARS.get(code)
        if dtype is None:
            self._bad(f"a field has the type {code}")
        return list(np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist())

    def _strings(self, count: int) -> list[str]:
        """As many times `_string`, in a third of the time: a vocabulary has 150,000 tokens and as many merges."""
        buffer, at, end, begun = self._buffer, self._at, self._end, self._at
        length_of, strings = int.from_bytes, []
        try:
            for _ in range(count):
                begun = at
                at += 8 + length_of(buffer[at : at + 8], "little")
                if at > end:
                    self._cut(at)
                strings.append(buffer[begun + 8 : at].decode())
        except UnicodeDecodeError:
            self._bad(f"the string at byte {begun:,} isn't UTF-8")
        self._at = at
        return strings

    def _string(self) -> str:
        at = self._at
        try:
            return self._take(self._number("<Q")).decode()
        except UnicodeDecodeError:
            self._bad(f"the string at byte {at:,} isn't UTF-8")

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, count: int) -> bytes:
        begin, self._at = self._at, self._at + count
        if self._at > self._end:
            self._cut(self._at)
        return self._buffer[begin : self._at]

    def _cut(self, needed: int) -> NoReturn:
        if needed > self._size:
            self._bad(f"its header needs {needed:,} bytes and the file has {self._size:,}")
        self._bad(f"its header has more than {_MOST_HEADER_NBYTES >> 20} MiB")

    def _bad(self, what: str) -> NoReturn:
        raise ModelError(f"{self._path} isn't a usable GGUF file: {what}. Fetch it again.")
