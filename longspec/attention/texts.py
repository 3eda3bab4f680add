"""Attention of all texts of a pass in one call a layer, their rows dense or coded: by the C kernel of `cpu.c`.

Takes the stages of a pass; puts the rows' keys and values, reads, and gives what `longspec.attention.attend` gives, bit
for bit. What costs some 60 us of Python a layer, part by part and text by text, is prepared once a pass: of the default
model's passes with 1, 8 and 16 texts in int8 attention took 3.0, 17 and 34 ms, and takes 0.7, 2.8 and 5.9.

A stage that is neither dense nor quantized in memory, or brings too many rows, is left to `attend`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from longspec.attention import cpu
from longspec.cache.dense import DenseStage
from longspec.cache.quantized import QuantizedStage
from longspec.cache.stage import BLOCK, CodedRun, Run, Shape

__all__ = ["Texts", "reads"]


class _Run(ctypes.Structure):
    _fields_ = (
        ("places", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "bits", "capacity", "column", "columns")),
        *((name, ctypes.c_void_p) for name in ("first", "last", "tail")),
        ("tail_columns", ctypes.c_int64),
    )


class _Text(ctypes.Structure):
    _fields_ = (
        ("runs", ctypes.POINTER(_Run)),
        *((name, ctypes.c_int64) for name in ("count", "at", "rows", "put")),
    )


class Span(Protocol):
    """The rows of one text in a pass."""

    @property
    def stage(self) -> Any: ...
    @property
    def staged(self) -> slice: ...  # their place in the stage
    @property
    def at(self) -> slice: ...  # their place in the pass


def reads(groups: int, span: Span) -> bool:
    """Whether the kernel takes these rows, with so many query heads to a key head."""
    stage, rows = span.stage, span.at.stop - span.at.start
    if type(stage) not in (DenseStage, QuantizedStage) or not stage.is_text(span.staged):
        return False
    return cpu.takes(rows * groups, stage.length)


class Texts:
    """Spans of one pass, all of which the kernel takes."""

    def __init__(self, spans: Sequence[Span], shape: Shape, queries: int, scale: float, softcap: float | None) -> None:
        """Queries: how many query heads."""
        kernel = cpu.kernel()
        assert not isinstance(kernel, str)
        self._kernel, self._threads = kernel, torch.get_num_threads()
        self._spans, self._shape = spans, shape
        self._reading = cpu.Reading(
            key_heads=shape.key_heads,
            groups=queries // shape.key_heads,
            dim=shape.head_dim,
            scale=scale,
            softcap=softcap or 0.0,
        )
        self._prepared = {window: self._prepare(window) for window in set(shape.windows)}

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, layer: int, made: Tensor, output: Tensor) -> None:
        """Put keys and values of `made` [r, (H + 2 K) * D], and write attention's output to [r, H * D]."""
        texts, room, _ = self._prepared[self._shape.windows[layer]]
        self.begin(made, [layer])
        self._kernel.texts_read(
            self._reading, texts, len(texts), layer, room.data_ptr(), self._threads, output.data_ptr()
        )

    def begin(self, made: Tensor, layers: Sequence[int]) -> None:
        """The kernel is about to be called for these layers by another one, with all that `made` will hold."""
        self._reading.queries, self._reading.query_row = made.data_ptr(), made.stride(0)
        for span in self._spans:
            for layer in layers:
                span.stage.filled(layer, span.staged)

    @property
    def call(self) -> tuple[int | None, int, int, int]:
        """Where the kernel is, and its arguments in all layers: queries, texts, threads."""
        kernel = ctypes.cast(self._kernel.texts_read, ctypes.c_void_p).value
        return kernel, ctypes.addressof(self._reading), len(self._spans), self._threads

    def pointers(self, window: int | None) -> tuple[int, int]:
        """Its arguments in the layers of one window: texts, room."""
        texts, room, _ = self._prepared[window]
        return ctypes.addressof(texts), room.data_ptr()

    def _prepare(self, window: int | None) -> tuple[ctypes.Array[_Text], Tensor, list[Any]]:
        """All texts as the layers of one window read them, the kernel's room, and what is pointed to."""
        held: list[Any] = []
        texts = []
        for span in self._spans:
            stage: DenseStage | QuantizedStage = span.stage
            runs = [_run(run, held) for run in stage.runs(span.staged, window)]
            array = (_Run * len(runs))(*runs)
            held.append(array)
            put = stage.offset + span.staged.start
            texts.append(_Text(array, len(runs), span.at.start, span.at.stop - span.at.start, put))
        made = (_Text * len(texts))(*texts)
        room = cpu.room_for(self._kernel.texts_room(self._reading, made, len(made), self._threads))
        return made, room, held


def _run(run: Run | CodedRun, held: list[Any]) -> _Run:
    if isinstance(run, Run):
        places = [buffer.data_ptr() for buffer in run.buffers]
        said = (cpu.DENSE, 16, run.buffers[0].shape[2], run.column)
    else:
        kind = cpu.kind_of(run.codec)
        places = [place for codes in run.codes for place in _places(codes, kind)]
        said = (kind, run.codec.bits, 0, run.blocks.start * BLOCK)
    array = (ctypes.c_int64 * len(places))(*places)
    held.append(array)
    return _Run(ctypes.addressof(array), *said, run.columns, *cpu.limits(run.bounds, held))


def _places(codes: tuple[Tensor, ...], kind: int) -> list[int]:
    """Of a layer: keys' codes, lower codes, steps and lows, or 0; the same of values; and the blocks of a head."""
    found, half = [each.data_ptr() for each in codes], len(codes) // 2
    capacity = codes[0].stride(0) // codes[0].stride(1)
    if kind == cpu.DUAL:
        return [*found, capacity]
    sides = [(code, 0, step, *(low or [0])) for code, step, *low in (found[:half], found[half:])]
    return [*sides[0], *sides[1], capacity]
