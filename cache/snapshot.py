"""Snapshot of a KV cache in one file: `--prompt-cache FILE`.

Takes any kind of cache through its `state` and `load_state`, the tokens of its rows, and an identity: fields (such as
hashes of weights and tokenizer) that must be equal for the keys and values to be valid. Knows no model; the caller of
`Snapshot.check` gives the expected identity.

    header    magic, version, offset and size of the index, CRC-32 of the index, CRC-32 of the header before it
    sections  contiguous raw tensors: tokens, then the cache's
    index     JSON: identity, length; name, dtype, shape, offset, size and CRC-32 of each section

All bytes are covered by checksums, and sizes aren't trusted: a section is read only if the cache asks for its name,
dtype and shape. Nothing is unpickled. A file is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from io import BufferedReader
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from longspec.cache.stage import Cache
from longspec.errors import LongspecError, UsageError
from longspec.machine.files import opened, parse_json
from longspec.machine.schema import TEXT, check, listed, mapped, row, whole

__all__ = ["Snapshot", "check_place", "save"]

_MAGIC = b"longspec"
VERSION = 1
"""Version of the format. It also changes if a kind of cache computes other keys, values or codes than before."""

_HEADER = struct.Struct("<8sIQQI")  # magic, version, offset and size of the index, its checksum
_CHECK = struct.Struct("<I")
_INDEX_LIMIT = 16 << 20  # bytes; a section takes 100, and a cache has at most six for each layer
_MOST_ROWS = 1 << 30
_COUNT, _SIZE = whole(0, _MOST_ROWS), whole(0, 1 << 62)
_INDEX = {
    "identity": mapped(TEXT),
    "length": _COUNT,
    "sections": listed(row(TEXT, TEXT, listed(_SIZE, 8), _SIZE, _SIZE, whole(0, (1 << 32) - 1)), 1 << 18),
}
_BEGIN = _HEADER.size + _CHECK.size


def save(path: Path, identity: Mapping[str, str], tokens: Sequence[int], cache: Cache) -> None:
    """Write a cache, whose rows belong to `tokens`, atomically: a file at `path` is replaced or stays as it is.

    Raises:
        LongspecError: the file can't be written.
        ValueError: the numbers of tokens and rows differ.
    """
    if len(tokens) != cache.length:
        raise ValueError(f"{len(tokens)} tokens can't name the {cache.length} rows of a cache")
    place = Path(os.path.realpath(path))
    try:
        number, name = tempfile.mkstemp(prefix=f".{place.name}-", dir=place.parent)
        try:
            with os.fdopen(number, "wb") as file:
                _write(file, identity, tokens, cache)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, place)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise LongspecError(f"The prompt cache {path} can't be written: {error.strerror or error}.") from error


def check_place(path: Path) -> None:
    """Raise UsageError if no file can be written at `path`; to be called before the prompt is prefilled."""
    if "\0" in str(path):
        raise UsageError(f"The prompt cache {str(path)!r} has a name that no file can have.")
    if path.exists() and not path.is_file():
        raise UsageError(f"The prompt cache {path} isn't a regular file; name a file to keep it in.")
    folder = Path(os.path.realpath(path)).parent
    if not os.access(folder, os.W_OK):
        why = "can't be written to" if folder.is_dir() else "doesn't exist"
        raise UsageError(f"The prompt cache {path} can't be kept: the folder {folder} {why}.")


class Snapshot:
    """An opened snapshot. Header and index are checked on construction, sections as they are read: the caller knows
    how many rows are of use to it.

    Raises:
        UsageError: the file isn't a snapshot, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path, "The prompt cache") as file:
            index = self._index(file)
            self.identity: dict[str, str] = index["identity"]
            self.length: int = index["length"]
            self._sections: dict[str, list[Any]] = {section[0]: section for section in index["sections"]}
        self._place("tokens", (self.length,), torch.int32)

    @cached_property
    def tokens(self) -> list[int]:
        """Those of its rows. Raises UsageError where they are damaged."""
        with opened(self.path, "The prompt cache") as file:
            found: list[int] = self._take(file, "tokens", (self.length,), torch.int32).tolist()
        return found

    def check(self, identity: Mapping[str, str]) -> None:
        """Raise UsageError, with the reason, unless the snapshot has this identity."""
        for name, wanted in identity.items():
            seen = self.identity.get(name)
            if seen != wanted:
                is_hash = len(wanted) == 64
                what = f"of another {name}" if is_hash else f"of the {name} {seen}, and this run's is {wanted}"
                raise UsageError(f"The prompt cache {self.path} is {what}; name another file, or delete this one.")

    def common(self, tokens: Sequence[int]) -> int:
        """Length of the common prefix of the snapshot's tokens and these."""
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, tokens, strict=False)))

    def load(self, cache: Cache) -> None:
        """Fill an empty cache of the saved kind. Raises UsageError if a section is missing, damaged or left over."""
        left = set(self._sections) - {"tokens"}
        with opened(self.path, "The prompt cache") as file:

            def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
                left.discard(name)
                return self._take(file, name, shape, dtype)

            cache.load_state(self.length, take)
        if left:
            self._bad(f"it has {len(left)} sections too many")

    def _index(self, file: BufferedReader) -> dict[str, Any]:
        size = os.fstat(file.fileno()).st_size
        header = file.read(_BEGIN)
        if not header.startswith(_MAGIC[: max(1, len(header))]):
            raise UsageError(f"{self.path} isn't a prompt cache; name another file.")
        if len(header) < _BEGIN or _CHECK.unpack_from(header, _HEADER.size)[0] != zlib.crc32(header[: _HEADER.size]):
            self._bad("its header is damaged")
        _, version, begin, length, crc = _HEADER.unpack_from(header)
        if version != VERSION:
            self._bad(f"it is version {version} of the format, and {VERSION} was expected")
        if length > _INDEX_LIMIT:
            self._bad(f"its index has more than {_INDEX_LIMIT >> 20} MiB")
        if begin + length != size or begin < _BEGIN:
            self._bad(f"expected {begin + length:,} bytes, found {size:,}")
        file.seek(begin)
        text = file.read(length)
        if zlib.crc32(text) != crc:
            self._bad("its index is damaged")
        try:
            index = parse_json(text)
        except ValueError:
            index = None
        if not isinstance(index, dict):
            self._bad("its index isn't a JSON object")
        check(f"The prompt cache {self.path}", index, _INDEX, UsageError, needed=frozenset(_INDEX))
        at = _BEGIN
        for _, _, _, offset, nbytes, _ in index["sections"]:
            if offset != at:
                self._bad("its sections don't lie behind each other")
            at += nbytes
        if at != begin:
            self._bad("its sections don't fill it")
        return index

    def _place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int, int]:
        """Offset, size and checksum of a section."""
        wanted = [_name(dtype), list(shape), prod(shape) * dtype.itemsize]
        _, kind, size, offset, nbytes, crc = self._sections.get(name, [None] * 6)
        if [kind, size, nbytes] != wanted:
            self._bad(f"its section {name} is {kind} {size}, and {wanted[0]} {wanted[1]} was expected")
        return offset, nbytes, crc

    def _take(self, file: BufferedReader, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        offset, nbytes, crc = self._place(name, shape, dtype)
        tensor = torch.empty(shape, dtype=dtype)
        if nbytes:
            raw = _bytes(tensor)
            file.seek(offset)
            if file.readinto(raw) != nbytes or zlib.crc32(raw) != crc:
                self._bad(f"its section {name} is damaged")
        return tensor

    def _bad(self, what: str) -> NoReturn:
        raise UsageError(f"The prompt cache {self.path} can't be used: {what}. Delete it to have it made anew.")


def _write(file: BinaryIO, identity: Mapping[str, str], tokens: Sequence[int], cache: Cache) -> None:
    file.write(bytes(_BEGIN))
    sections: list[list[Any]] = []
    at = _BEGIN

    def add(name: str, tensor: Tensor) -> None:
        nonlocal at
        held = tensor.to("cpu").contiguous()
        raw = _bytes(held) if held.nbytes else memoryview(b"")
        sections.append([name, _name(held.dtype), list(held.shape), at, held.nbytes, zlib.crc32(raw)])
        file.write(raw)
        at += held.nbytes

    add("tokens", torch.tensor(tokens, dtype=torch.int32))
    for name, tensor in cache.state():
        add(name, tensor)
    index = json.dumps({"identity": dict(identity), "length": len(tokens), "sections": sections}).encode()
    file.write(index)
    header = _HEADER.pack(_MAGIC, VERSION, at, len(index), zlib.crc32(index))
    file.seek(0)
    file.write(header + _CHECK.pack(zlib.crc32(header)))


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, not copied."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
