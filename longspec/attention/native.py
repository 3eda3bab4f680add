"""Backend of the CPU for a few rows in bf16: the C kernel of `cpu.c`, on a processor with tiles (AMX).

It takes all parts of a pass one by one and joins them itself, reads coded blocks in place, and keys and values once for
all query heads and rows. A layer of the default model at 7,000 columns on two cores, milliseconds for 1 and for 9 rows:

    dense 0.35, 0.61    int8 0.30, 0.51    int4 0.37, 0.56    dual 0.50, 0.72    dense by torch 0.72, 1.01
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longspec.cache.codes import Codec, DualCodec
from longspec.cache.stage import Bounds, CodedPart, Part
from longspec.kernels.build import library

__all__ = [
    "DENSE",
    "DUAL",
    "USE",
    "Reading",
    "attend",
    "kernel",
    "kind_of",
    "limits",
    "missing",
    "refuses",
    "room_for",
    "takes",
    "unfit",
]

USE = "a few rows in bf16 on the CPU"

_MOST_ROWS, _ALWAYS, _FEW_COLUMNS = 768, 64, 4096


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "lower", "step", "low")),
        *((name, ctypes.c_int64) for name in ("head", "lower_head", "step_head", "low_head")),
    )


class _Part(ctypes.Structure):
    _fields_ = (
        ("keys", _Side),
        ("values", _Side),
        *((name, ctypes.c_int64) for name in ("kind", "bits", "columns")),
        *((name, ctypes.c_void_p) for name in ("first", "last", "tail")),
        ("tail_columns", ctypes.c_int64),
    )


class Reading(ctypes.Structure):
    """The queries of a pass as the kernel takes them."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("query_row", "rows", "key_heads", "groups", "dim")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


DENSE, SYMMETRIC, ASYMMETRIC, DUAL = range(4)
"""Kinds of parts."""
_room = torch.empty(0, dtype=torch.uint8)


@cache
def missing() -> str | None:
    """Why this machine can't run it; None where it can."""
    found = kernel()
    return found if isinstance(found, str) else None


def unfit(dtype: torch.dtype, device: torch.device, dim: int) -> str | None:
    """Why it doesn't read heads of `dim` channels; None where it does."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return f"it reads bf16 on the CPU, not {dtype} on {device.type}"
    if dim % 64 or dim > 256:
        return f"it reads heads of 64, 128, 192 or 256 channels, not {dim}"
    return missing()


def takes(rows: int, columns: int) -> bool:
    """Whether it reads so many rows, times query heads of a key head, over so many columns.

    Passes of the default model by it and by torch, in ms: 32 rows 12 and 25, 256 rows 62 and 77, 512 rows 140 and 157;
    at 5,000 columns 128 rows 103 and 112, 512 rows 448 and 406. What it needs to work in grows with both.
    """
    return rows <= max(_ALWAYS, _MOST_ROWS // (1 + columns // _FEW_COLUMNS))


def refuses(queries: Tensor, part: Part | CodedPart) -> str | None:
    """Why it doesn't take a pass with these queries [q, H, D], the first part of which is this; None where it does.

    Of codes it takes any rows: a prompt of 7,000 tokens is read in 8.8 s where torch decodes them in 12.8.
    """
    rows, heads, dim = queries.shape
    groups = heads // _key_heads(part)
    if not isinstance(part, CodedPart) and not takes(rows * groups, part.columns):
        return f"{rows * groups} rows are too many for it"
    return unfit(queries.dtype, queries.device, dim)


def attend(queries: Tensor, parts: Iterable[Part | CodedPart], scale: float, softcap: float | None = None) -> Tensor:
    """Attention of queries [q, H, D] over all parts, one of which has columns; [q, H, D]."""
    library, threads = kernel(), torch.get_num_threads()
    assert not isinstance(library, str)
    output = torch.empty(queries.shape, dtype=queries.dtype)
    reading = state = None
    for part, is_last in _marked(parts):
        begin = reading is None
        if reading is None or state is None:
            reading = _reading(queries, part, scale, softcap)
            state = torch.empty(library.attention_state(reading), dtype=torch.uint8)
        held: list[Tensor] = []
        made = _part(part, held)
        room = room_for(library.attention_room(reading, part.columns, threads))
        target = output.data_ptr() if is_last else None
        library.attention_read(reading, made, begin, room.data_ptr(), threads, state.data_ptr(), target)
        del held
    return output


def _marked(parts: Iterable[Part | CodedPart]) -> Iterator[tuple[Part | CodedPart, bool]]:
    """Each part that has columns, as it comes, and whether it is the last."""
    before = None
    for part in parts:
        if part.columns:
            if before is not None:
                yield before, False
            before = part
    if before is not None:
        yield before, True


def room_for(nbytes: int) -> Tensor:
    """The working room of one call, kept for the next."""
    global _room
    if len(_room) < nbytes:
        _room = torch.empty(nbytes * 5 // 4, dtype=torch.uint8)
    return _room


def _reading(queries: Tensor, part: Part | CodedPart, scale: float, softcap: float | None) -> Reading:
    rows, heads, dim = queries.shape
    key_heads = _key_heads(part)
    if queries.stride()[1:] != (dim, 1):
        queries = queries.contiguous()
    made = Reading(
        queries.data_ptr(), queries.stride(0), rows, key_heads, heads // key_heads, dim, scale, softcap or 0.0
    )
    made.held = queries  # for as long as it is pointed to
    return made


def _key_heads(part: Part | CodedPart) -> int:
    return len(part.keys if isinstance(part, Part) else part.codes[0])


def limits(bounds: Bounds | None, held: list[Tensor]) -> tuple[int | None, int | None, int | None, int]:
    """Bounds as the kernel takes them; `held` is given the tensors that are pointed to."""
    if bounds is None:
        return None, None, None, 0
    held += (bounds.first, bounds.last)
    first, last = bounds.first.data_ptr(), bounds.last.data_ptr()
    if bounds.tail is None or not bounds.tail.shape[1]:
        return first, last, None, 0
    held.append(bounds.tail.contiguous())
    return first, last, held[-1].data_ptr(), bounds.tail.shape[1]


def _part(part: Part | CodedPart, held: list[Tensor]) -> _Part:
    """The part as the kernel takes it; `held` is given the tensors that it points to."""
    bounds = limits(part.bounds, held)
    if isinstance(part, Part):
        keys, values = _rows(part.keys, held), _rows(part.values, held)
        return _Part(keys, values, DENSE, 16, part.columns, *bounds)
    kind, half = kind_of(part.codec), len(part.codes) // 2
    keys, values = (_codes(side, kind, held) for side in (part.codes[:half], part.codes[half:]))
    return _Part(keys, values, kind, part.codec.bits, part.columns, *bounds)


def kind_of(codec: Any) -> int:
    """Of a part that it has coded."""
    assert isinstance(codec, Codec)
    return DUAL if isinstance(codec, DualCodec) else SYMMETRIC if codec.symmetric else ASYMMETRIC


def _rows(rows: Tensor, held: list[Tensor]) -> _Side:
    """Rows [K, n, D] in bf16."""
    if rows.stride()[1:] != (rows.shape[2], 1):
        rows = rows.contiguous()
    held.append(rows)
    return _Side(codes=rows.data_ptr(), head=rows.stride(0) * 2)


def _codes(side: tuple[Tensor, ...], kind: int, held: list[Tensor]) -> _Side:
    """A codec's tensors of keys or of values, each [K, b, ...]: codes, the lower plane of two, steps, lows."""
    whole = [each if each[0].is_contiguous() else each.contiguous() for each in side]
    held += whole
    codes, lower = whole[0], whole[1] if kind == DUAL else None
    scales = whole[2:] if kind == DUAL else whole[1:]
    made = _Side(codes=codes.data_ptr(), head=codes.stride(0), step=scales[0].data_ptr(), step_head=scales[0].stride(0))
    if lower is not None:
        made.lower, made.lower_head = lower.data_ptr(), lower.stride(0)
    if kind != SYMMETRIC:
        made.low, made.low_head = scales[1].data_ptr(), scales[1].stride(0)
    return made


@cache
def kernel() -> ctypes.CDLL | str:
    """The kernel's library; a sentence where it can't be had."""
    found = library("attention.c")
    if isinstance(found, str):
        return found
    reading, part = ctypes.POINTER(Reading), ctypes.POINTER(_Part)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.attention_state.argtypes, found.attention_state.restype = (reading,), number
    found.attention_room.argtypes, found.attention_room.restype = (reading, number, number), number
    found.attention_read.argtypes = (reading, part, number, pointer, number, pointer, pointer)
    found.texts_room.argtypes, found.texts_room.restype = (reading, pointer, number, number), number
    found.texts_read.argtypes = (reading, pointer, number, number, pointer, number, pointer)
    return found
