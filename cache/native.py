"""Segments of a cache as the C kernels take them, and the attention kernel's library.

Takes segments and bounds; gives structs of pointers, and the tensors that they point to, which are to be kept for the
call. What is computed of them is `longspec.attention.native`'s and `longspec.cache.choice`'s.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longspec.cache.codes import Codec, DualCodec, GroupCodec
from longspec.cache.stage import Bounds, Segment
from longspec.kernels.boundary import pointer
from longspec.kernels.build import library

__all__ = [
    "DENSE",
    "DUAL",
    "GROUPED",
    "Pieces",
    "Reading",
    "copy_rows",
    "kernel",
    "kind_of",
    "limits",
    "read_rows",
    "reading_of",
    "segment_of",
    "sinks_of",
    "unfit",
]


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "lower", "step", "low")),
        *((name, ctypes.c_int64) for name in ("head", "lower_head", "step_head", "low_head")),
    )


class Pieces(ctypes.Structure):
    """A segment: the kernel's C struct."""

    _fields_ = (
        ("keys", _Side),
        ("values", _Side),
        *((name, ctypes.c_int64) for name in ("kind", "bits", "columns", "start")),
        *((name, ctypes.c_void_p) for name in ("first", "last", "tail", "parents")),
        ("staged", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("chosen", "slots", "exact")),
        *((name, ctypes.c_int64) for name in ("most", "stride")),
        ("scores", ctypes.c_void_p),
    )


class Reading(ctypes.Structure):
    """The queries of a pass: the kernel's C struct."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("query_row", "rows", "key_heads", "groups", "dim")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
    )


DENSE, SYMMETRIC, ASYMMETRIC, DUAL, GROUPED = range(5)
"""Kinds of segments."""


def sinks_of(sinks: Tensor | None, heads: int) -> int | None:
    """The kernel's pointer to the heads' sinks."""
    return None if sinks is None else pointer(sinks, torch.float32, heads)


def limits(
    bounds: Bounds | None, rows: int, held: list[Tensor]
) -> tuple[int | None, int | None, int | None, int | None, int]:
    """The bounds of `rows` positions as the kernel's arguments: pointers to first, last, tail and parents, and the
    tail's number of columns; the tensors pointed to are appended to `held`.
    """
    if bounds is None:
        return None, None, None, None, 0
    held += (bounds.first, bounds.last)
    first, last = (pointer(each, torch.int64, rows) for each in (bounds.first, bounds.last))
    if bounds.tail is None or not bounds.tail.shape[1]:
        return first, last, None, None, 0
    held.append(bounds.tail.contiguous())
    staged, parents = bounds.tail.shape[1], bounds.parents
    if parents is not None:
        held.append(parents)
    tree = None if parents is None else pointer(parents, torch.int64, staged)
    return first, last, pointer(held[-1 if parents is None else -2], torch.bool, rows, staged), tree, staged


def segment_of(part: Segment, rows: int, dim: int, held: list[Tensor]) -> Pieces:
    """The segment as the kernel's C struct; the tensors pointed to are appended to `held`."""
    bounds = limits(part.bounds, rows, held)
    if part.codec is None:
        keys, values = _rows(part.keys, dim, held), _rows(part.values, dim, held)
        return Pieces(keys, values, DENSE, 16, part.columns, part.start, *bounds)
    kind, half = kind_of(part.codec), len(part.tensors) // 2
    keys, values = (_codes(side, kind, held) for side in (part.tensors[:half], part.tensors[half:]))
    made = Pieces(keys, values, kind, part.codec.bits, part.columns, part.start, *bounds)
    if (chosen := part.chosen) is not None:
        sizes = (rows, part.key_heads, chosen.columns.shape[2])
        held += (chosen.columns, chosen.slots, chosen.rows)
        made.chosen, made.slots = (pointer(each, torch.int32, *sizes) for each in (chosen.columns, chosen.slots))
        made.exact, made.most = pointer(chosen.rows, torch.bfloat16, None, 2, dim), sizes[2]
        if chosen.scores is not None:
            made.scores, made.stride = chosen.scores.data_ptr(), chosen.scores.stride(1)
    return made


def kind_of(codec: Any) -> int:
    """The kernel's number for a codec's kind of codes."""
    if not isinstance(codec, Codec):
        raise TypeError(f"the kernel doesn't read codes of {type(codec).__name__}")
    if isinstance(codec, GroupCodec):
        return GROUPED
    return DUAL if isinstance(codec, DualCodec) else SYMMETRIC if codec.symmetric else ASYMMETRIC


def _rows(rows: Tensor, dim: int, held: list[Tensor]) -> _Side:
    """The C struct of dense rows [K, n, D] in bf16."""
    if rows.stride()[1:] != (dim, 1):
        rows = rows.contiguous()
    held.append(rows)
    pointer(rows[0], torch.bfloat16, None, dim)
    return _Side(codes=rows.data_ptr(), head=rows.stride(0) * 2)


def _codes(side: tuple[Tensor, ...], kind: int, held: list[Tensor]) -> _Side:
    """The C struct of a codec's tensors of keys or of values, each [K, b, ...]: codes, the dual codec's lower plane,
    steps, lows.
    """
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


def reading_of(
    queries: Tensor, part: Segment, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Reading:
    """The struct of queries [q, H, D], without gaps, that read this segment."""
    rows, heads, dim = queries.shape
    key_heads = part.key_heads
    at = pointer(queries, torch.bfloat16, rows, heads, dim)
    groups, held = heads // key_heads, sinks_of(sinks, heads)
    return Reading(at, heads * dim, rows, key_heads, groups, dim, scale, softcap or 0.0, held)


def copy_rows(at: Any, to: Any, places: Any) -> None:
    """Copy rows from addresses [n] to places [n] of an array [.., bytes]."""
    found, nbytes = kernel(), to.shape[1]
    if not isinstance(found, str):
        found.rows_copy(at.ctypes.data, len(at), nbytes, to.ctypes.data, places.ctypes.data)
        return
    for place, address in zip(places.tolist(), at.tolist(), strict=True):
        ctypes.memmove(to[place].ctypes.data, address, nbytes)


def read_rows(file: int, at: Any, to: Any, places: Any) -> int:
    """Read rows from a file's bytes [n] on to places [n] of an array [.., bytes]; the number of rows before one that
    isn't there.
    """
    found, nbytes = kernel(), to.shape[1]
    if not isinstance(found, str):
        done: int = found.rows_read(file, at.ctypes.data, len(at), nbytes, to.ctypes.data, places.ctypes.data)
        return done
    for i, (place, start) in enumerate(zip(places.tolist(), at.tolist(), strict=True)):
        if os.preadv(file, [to[place]], start) != nbytes:
            return i
    return len(at)


def unfit(dtype: torch.dtype, device: torch.device, dim: int) -> str | None:
    """The reason why it can't take heads of `dim` channels; None where it can."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return f"it reads bf16 on the CPU, not {dtype} on {device.type}"
    if dim % 32 or dim > 512:
        return f"it reads heads of 32, 64, 96 and so on up to 512 channels, not {dim}"
    found = kernel()
    return found if isinstance(found, str) else None


def kernel() -> ctypes.CDLL | str:
    """The loaded C library; the reason as a string where it isn't available."""
    found = library("attention.c")
    return found if isinstance(found, str) else _declared(found)


@cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    reading, segments = ctypes.POINTER(Reading), ctypes.POINTER(Pieces)
    place, number = ctypes.c_void_p, ctypes.c_int64
    found.attention_state.argtypes, found.attention_state.restype = (reading,), number
    found.attention_workspace.argtypes, found.attention_workspace.restype = (reading, segments, number, number), number
    found.attention_read.argtypes = (reading, segments, number, number, place, number, place, place, place)
    found.texts_workspace.argtypes, found.texts_workspace.restype = (reading, place, number, number), number
    found.texts_read.argtypes = (reading, place, number, number, number, number, place, number, place, place)
    found.texts_attend.argtypes = (reading, place, number, number, number, number, place, place, place, number)
    found.attention_choice_workspace.argtypes, found.attention_choice_workspace.restype = (place, number), number
    found.attention_choose.argtypes = (place, number, place)
    found.rows_gather.argtypes = (place,)
    found.rows_copy.argtypes = (place, number, number, place, place)
    found.rows_read.argtypes, found.rows_read.restype = (ctypes.c_int32, place, number, number, place, place), number
    return found
