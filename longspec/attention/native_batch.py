"""Attention of all texts of a pass in one call a layer, their rows dense or coded: by the C kernel of `attention.c`.

Takes the stages of a pass; puts the rows' keys and values, reads, and gives what `longspec.attention.attend` gives, bit
for bit. What costs some 60 us of Python a layer, part by part and text by text, is prepared once a pass: of the default
model's passes with 1, 8 and 16 texts in int8 attention took 3.0, 17 and 34 ms, and takes 0.7, 2.8 and 5.9.

A stage of which only the queries tell what is read is left to `attend`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from longspec.attention import native as cpu
from longspec.cache.stage import Segment, Shape, Stage
from longspec.kernels.boundary import pointer, workspace

__all__ = ["Texts", "reads"]


_RUN_WORDS = 12


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


def reads(span: Span) -> bool:
    """Whether it is known before any layer has run what these rows read."""
    return span.stage.is_known(span.staged)


class Texts:
    """Spans of one pass, all of which the kernel takes."""

    def __init__(self, spans: Sequence[Span], shape: Shape, queries: int, scale: float, softcap: float | None) -> None:
        """Queries: how many query heads."""
        kernel = cpu.kernel()
        if isinstance(kernel, str):
            raise RuntimeError(kernel)
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
        self._rows = max(span.at.stop for span in spans)
        self._width = (queries + 2 * shape.key_heads) * shape.head_dim
        self._prepared = [self._prepare(kinds.index(kind)) for kind in different]
        self._nbytes = max(
            kernel.texts_workspace(self._reading, texts, len(texts), self._threads) for texts in self._prepared
        )

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, layer: int, made: Tensor, output: Tensor) -> None:
        """Put keys and values of `made` [r, (H + 2 K) * D], and write attention's output to [r, H * D]."""
        texts = self._prepared[self.read_of[layer]]
        self.begin(made, [layer])
        at = pointer(output, torch.bfloat16, len(made), None)
        self._kernel.texts_read(
            self._reading, texts, len(texts), layer, 0, len(made), self._workspace(), self._threads, at
        )

    def begin(self, made: Tensor, layers: Sequence[int]) -> None:
        """The kernel is about to be called for these layers by another one, with all that `made` will hold."""
        self._reading.queries = pointer(made, torch.bfloat16, None, self._width)
        self._reading.query_row = self._width
        if len(made) < self._rows:
            raise ValueError(f"a pass of {self._rows} rows can't be of {len(made)}")
        for span in self._spans:
            for layer in layers:
                span.stage.filled(layer, span.staged)

    @property
    def call(self) -> tuple[int | None, int, int, int]:
        """Where the kernel is, and its arguments in all layers: queries, texts, threads."""
        kernel = ctypes.cast(self._kernel.texts_read, ctypes.c_void_p).value
        return kernel, ctypes.addressof(self._reading), len(self._spans), self._threads

    def reads(self) -> list[tuple[int, int]]:
        """Its arguments in the layers of each kind, of which `read_of` says a layer's: texts, and the calling thread's
        workspace.
        """
        at = self._workspace()
        return [(ctypes.addressof(texts), at) for texts in self._prepared]

    def _workspace(self) -> int:
        return workspace("attention", self._nbytes).data_ptr()

    def _prepare(self, layer: int) -> ctypes.Array[_Text]:
        """All texts as the layer reads them."""
        texts = []
        for span in self._spans:
            rows = span.at.stop - span.at.start
            runs = [self._run(run, rows) for run in span.stage.runs(layer, span.staged)]
            words = (ctypes.c_int64 * (_RUN_WORDS * len(runs)))(*[word for run in runs for word in run])
            self._held.append(words)
            put = span.stage.offset + span.staged.start
            texts.append(_Text(ctypes.addressof(words), len(runs), span.at.start, rows, put))
        return (_Text * len(texts))(*texts)

    def _run(self, run: Segment, rows: int) -> tuple[int, ...]:
        """A run as the kernel's struct, which is twelve words."""
        limits = [word or 0 for word in cpu.limits(run.bounds, rows, self._held)]
        if run.codec is None:
            capacity = run.layers[0][0].shape[1]
            return self._placed(run), cpu.DENSE, 16, capacity, run.column, run.columns, run.start, *limits
        kind, bits = cpu.kind_of(run.codec), run.codec.bits
        return self._placed(run), kind, bits, 0, run.column, run.columns, run.start, *limits

    def _placed(self, run: Segment) -> int:
        """Where the places of its rows in all layers stand; once for all runs of the same tensors."""
        tensors = run.layers
        if id(tensors) not in self._places:
            if run.codec is None:
                places = [layer.data_ptr() for layer in cast(Sequence[Tensor], run.layers)]
            else:
                kind = cpu.kind_of(run.codec)
                places = [place for codes in run.layers for place in _places(tuple(codes), kind)]
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
