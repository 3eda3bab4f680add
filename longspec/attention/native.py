"""Backend of the CPU in bf16: the C kernel of `attention.c`.

It takes all segments of a pass and merges them itself, dequantizes blocks in registers, and loads keys and values
once for all query heads and positions. A position's bits depend on the position and the columns it attends to, not on
the other positions or on the buffers: adjacent segments are computed as one. Milliseconds for one layer of the
default model at 7,000 columns on two cores with AMX, for 1 and for 9 positions:

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
from longspec.cache.stage import Bounds, Segment
from longspec.kernels.boundary import pointer, workspace
from longspec.kernels.build import library
from longspec.kernels.team import team

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
    "sinks_of",
    "unfit",
]

USE = "bf16 on the CPU"


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "lower", "step", "low")),
        *((name, ctypes.c_int64) for name in ("head", "lower_head", "step_head", "low_head")),
    )


class _Segment(ctypes.Structure):
    _fields_ = (
        ("keys", _Side),
        ("values", _Side),
        *((name, ctypes.c_int64) for name in ("kind", "bits", "columns", "start")),
        *((name, ctypes.c_void_p) for name in ("first", "last", "tail", "parents")),
        ("staged", ctypes.c_int64),
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


DENSE, SYMMETRIC, ASYMMETRIC, DUAL = range(4)
"""Kinds of segments."""


def missing() -> str | None:
    """The reason why this machine can't run it; None where it can."""
    found = kernel()
    return found if isinstance(found, str) else None


def unfit(dtype: torch.dtype, device: torch.device, dim: int) -> str | None:
    """The reason why it can't take heads of `dim` channels; None where it can."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return f"it reads bf16 on the CPU, not {dtype} on {device.type}"
    if dim % 32 or dim > 512:
        return f"it reads heads of 32, 64, 96 and so on up to 512 channels, not {dim}"
    return missing()


def refuses(queries: Tensor, part: Segment) -> str | None:
    """The reason why it can't take a pass with these queries [q, H, D] and this first segment; None where it can."""
    return unfit(queries.dtype, queries.device, queries.shape[2])


def attend(
    queries: Tensor, parts: Iterable[Segment], scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention of queries [q, H, D] over all segments, at least one of which has columns; [q, H, D].

    sinks: [H] in fp32, as of `longspec.attention.attend`.
    """
    library, (of_all, threads) = kernel(), team()
    if isinstance(library, str):
        raise RuntimeError(library)
    queries = queries.contiguous()
    output = torch.empty(queries.shape, dtype=queries.dtype)
    reading = state = None
    for run, is_last in _runs(parts):
        begin = reading is None
        if reading is None or state is None:
            reading = _reading(queries, run[0], scale, softcap, sinks)
            state = torch.empty(library.attention_state(reading), dtype=torch.uint8)
        held: list[Tensor] = []
        segments = (_Segment * len(run))(*(_segment(part, len(queries), queries.shape[2], held) for part in run))
        room = workspace("attention", library.attention_workspace(reading, segments, len(run), threads))
        target = output.data_ptr() if is_last else None
        library.attention_read(
            reading, segments, len(run), begin, room.data_ptr(), threads, state.data_ptr(), target, of_all
        )
        del held
    return output


def _runs(parts: Iterable[Segment]) -> Iterator[tuple[list[Segment], bool]]:
    """Groups of non-empty segments, adjacent dense ones together; and whether the group is the last."""
    run: list[Segment] = []
    for part in parts:
        if not part.columns:
            continue
        if run and not _follows(run[-1], part):
            yield run, False
            run = []
        run.append(part)
    if run:
        yield run, True


def _follows(before: Segment, part: Segment) -> bool:
    return not before.is_coded and not part.is_coded and before.start + before.columns == part.start


def sinks_of(sinks: Tensor | None, heads: int) -> int | None:
    """The kernel's pointer to the heads' sinks."""
    return None if sinks is None else pointer(sinks, torch.float32, heads)


def _reading(queries: Tensor, part: Segment, scale: float, softcap: float | None, sinks: Tensor | None) -> Reading:
    rows, heads, dim = queries.shape
    key_heads = part.key_heads
    at = pointer(queries, torch.bfloat16, rows, heads, dim)
    groups, held = heads // key_heads, sinks_of(sinks, heads)
    return Reading(at, heads * dim, rows, key_heads, groups, dim, scale, softcap or 0.0, held)


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


def _segment(part: Segment, rows: int, dim: int, held: list[Tensor]) -> _Segment:
    """The segment as the kernel's C struct; the tensors pointed to are appended to `held`."""
    bounds = limits(part.bounds, rows, held)
    if part.codec is None:
        keys, values = _rows(part.keys, dim, held), _rows(part.values, dim, held)
        return _Segment(keys, values, DENSE, 16, part.columns, part.start, *bounds)
    kind, half = kind_of(part.codec), len(part.tensors) // 2
    keys, values = (_codes(side, kind, held) for side in (part.tensors[:half], part.tensors[half:]))
    return _Segment(keys, values, kind, part.codec.bits, part.columns, part.start, *bounds)


def kind_of(codec: Any) -> int:
    """The kernel's number for a codec's kind of codes."""
    if not isinstance(codec, Codec):
        raise TypeError(f"the kernel doesn't read codes of {type(codec).__name__}")
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


def kernel() -> ctypes.CDLL | str:
    """The loaded C library; the reason as a string where it isn't available."""
    found = library("attention.c")
    return found if isinstance(found, str) else _declared(found)


@cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    reading, segments = ctypes.POINTER(Reading), ctypes.POINTER(_Segment)
    place, number = ctypes.c_void_p, ctypes.c_int64
    found.attention_state.argtypes, found.attention_state.restype = (reading,), number
    found.attention_workspace.argtypes, found.attention_workspace.restype = (reading, segments, number, number), number
    found.attention_read.argtypes = (reading, segments, number, number, place, number, place, place, place)
    found.texts_workspace.argtypes, found.texts_workspace.restype = (reading, place, number, number), number
    found.texts_read.argtypes = (reading, place, number, number, number, number, place, number, place, place)
    found.texts_attend.argtypes = (reading, place, number, number, number, number, place, place, place, number)
    return found
