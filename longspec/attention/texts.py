"""Attention of all texts of a pass in one call a layer: where their rows stand dense, by the C kernel of `cpu.c`.

Takes the stages of a pass; puts the rows' keys and values, reads, and gives what `longspec.attention.attend` gives, bit
for bit. What costs some 60 us of Python a layer, part by part and text by text, is prepared once a pass: of the default
model's passes with 1, 8 and 16 texts in int8 attention took 3.0, 17 and 34 ms, and takes 0.7, 2.8 and 5.9.

A stage that isn't dense, or brings too many rows, is left to `attend`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from longspec.attention import cpu
from longspec.cache.dense import DenseStage
from longspec.cache.stage import Run, Shape

__all__ = ["Texts", "reads"]


class _Run(ctypes.Structure):
    _fields_ = (
        ("buffers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("capacity", "column", "columns")),
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
    rows = span.at.stop - span.at.start
    return isinstance(span.stage, DenseStage) and cpu.takes(rows * groups, span.stage.length)


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
            stage: DenseStage = span.stage
            runs = [_run(run, held) for run in stage.runs(span.staged, window)]
            array = (_Run * len(runs))(*runs)
            held.append(array)
            put = stage.offset + span.staged.start
            texts.append(_Text(array, len(runs), span.at.start, span.at.stop - span.at.start, put))
        made = (_Text * len(texts))(*texts)
        room = cpu.room_for(self._kernel.texts_room(self._reading, made, len(made), self._threads))
        return made, room, held


def _run(run: Run, held: list[Any]) -> _Run:
    buffers = (ctypes.c_void_p * len(run.buffers))(*[buffer.data_ptr() for buffer in run.buffers])
    held.append(buffers)
    capacity = run.buffers[0].shape[2]
    limits = cpu.limits(run.bounds, held)
    return _Run(ctypes.addressof(buffers), capacity, run.column, run.columns, *limits)
