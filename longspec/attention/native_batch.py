"""Attention of all texts of a pass in one call a layer, their rows dense or coded: by the C kernel of `cpu.c`.

Takes the stages of a pass; puts the rows' keys and values, reads, and gives what `longspec.attention.attend` gives, bit
for bit. What costs some 60 us of Python a layer, part by part and text by text, is prepared once a pass: of the default
model's passes with 1, 8 and 16 texts in int8 attention took 3.0, 17 and 34 ms, and takes 0.7, 2.8 and 5.9.

A stage of which only the queries tell what is read, or that brings too many rows, is left to `attend`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from longspec.attention import native as cpu
from longspec.cache.stage import CodedRun, Run, Shape, Stage

__all__ = ["Texts", "reads"]


_RUN_WORDS = 10


class _Text(ctypes.Structure):
    _fields_ = (
        ("runs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "at", "rows", "put")),
    )


class Span(Protocol):
    """The rows of one text in a pass."""

    @property
    def stage(self) -> Stage: ...
    @property
    def staged(self) -> slice: ...  # their place in the stage
    @property
    def at(self) -> slice: ...  # their place in the pass


def reads(groups: int, span: Span) -> bool:
    """Whether the kernel takes these rows, with so many query heads to a key head."""
    rows = span.at.stop - span.at.start
    return span.stage.is_known(span.staged) and cpu.takes(rows * groups, span.stage.length)


class Texts:
    """Spans of one pass, all of which the kernel takes."""

    def __init__(self, spans: Sequence[Span], shape: Shape, queries: int, scale: float, softcap: float | None) -> None:
        """Queries: how many query heads."""
        kernel = cpu.kernel()
        assert not isinstance(kernel, str)
        self._kernel, self._threads = kernel, torch.get_num_threads()
        self._spans = spans
        self._reading = cpu.Reading(
            key_heads=shape.key_heads,
            groups=queries // shape.key_heads,
            dim=shape.head_dim,
            scale=scale,
            softcap=softcap or 0.0,
        )
        kinds: Sequence[Any] = range(shape.layers) if any(span.stage.by_layer for span in spans) else shape.windows
        different = list(dict.fromkeys(kinds))
        self.read_of = [different.index(kind) for kind in kinds]
        self._places: dict[int, int] = {}
        self._held: list[Any] = []
        self._prepared = [self._prepare(kinds.index(kind)) for kind in different]

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, layer: int, made: Tensor, output: Tensor) -> None:
        """Put keys and values of `made` [r, (H + 2 K) * D], and write attention's output to [r, H * D]."""
        texts, room = self._prepared[self.read_of[layer]]
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

    @property
    def reads(self) -> list[tuple[int, int]]:
        """Its arguments in the layers of each kind, of which `read_of` says a layer's: texts, room."""
        return [(ctypes.addressof(texts), room.data_ptr()) for texts, room in self._prepared]

    def _prepare(self, layer: int) -> tuple[ctypes.Array[_Text], Tensor]:
        """All texts as the layer reads them, and the kernel's room."""
        texts = []
        for span in self._spans:
            runs = span.stage.runs(layer, span.staged)
            words = (ctypes.c_int64 * (_RUN_WORDS * len(runs)))(*[word for run in runs for word in self._run(run)])
            self._held.append(words)
            put = span.stage.offset + span.staged.start
            rows = span.at.stop - span.at.start
            texts.append(_Text(ctypes.addressof(words), len(runs), span.at.start, rows, put))
        made = (_Text * len(texts))(*texts)
        return made, cpu.room_for(self._kernel.texts_room(self._reading, made, len(made), self._threads))

    def _run(self, run: Run | CodedRun) -> tuple[int, ...]:
        """A run as the kernel's struct, which is ten words."""
        limits = [word or 0 for word in cpu.limits(run.bounds, self._held)]
        if isinstance(run, Run):
            return self._placed(run), cpu.DENSE, 16, run.buffers[0].shape[2], run.column, run.columns, *limits
        kind, bits = cpu.kind_of(run.codec), run.codec.bits
        return self._placed(run), kind, bits, 0, run.start, run.columns, *limits

    def _placed(self, run: Run | CodedRun) -> int:
        """Where the places of its rows in all layers stand; once for all runs of the same tensors."""
        tensors = run.buffers if isinstance(run, Run) else run.codes
        if id(tensors) not in self._places:
            if isinstance(run, Run):
                places = [buffer.data_ptr() for buffer in run.buffers]
            else:
                kind = cpu.kind_of(run.codec)
                places = [place for codes in run.codes for place in _places(codes, kind)]
            array = (ctypes.c_int64 * len(places))(*places)
            self._held += (array, tensors)
            self._places[id(tensors)] = ctypes.addressof(array)
        return self._places[id(tensors)]


def _places(codes: tuple[Tensor, ...], kind: int) -> list[int]:
    """Of a layer: keys' codes, lower codes, steps and lows, or 0; the same of values; and the blocks of a head."""
    found, half = [each.data_ptr() for each in codes], len(codes) // 2
    capacity = codes[0].stride(0) // codes[0].stride(1)
    if kind == cpu.DUAL:
        return [*found, capacity]
    sides = [(code, 0, step, *(low or [0])) for code, step, *low in (found[:half], found[half:])]
    return [*sides[0], *sides[1], capacity]
