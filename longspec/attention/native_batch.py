"""Batched attention (varlen): all sequences of a pass in one call per layer, dense or quantized, by the C kernel of
`attention.c`.

Takes the stages of a pass; writes keys and values of the new rows, attends, and gives the output of
`longspec.attention.attend`, bit for bit. The Python work per segment and sequence, some 60 us a layer, is done once a
pass: attention of the default model's passes over 1, 8 and 16 sequences with an int8 cache took 3.0, 17 and 34 ms
before, and takes 0.7, 2.8 and 5.9 (two cores with AMX).

A stage whose segments depend on the queries is left to `attend`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from longspec.cache import native as cpu
from longspec.cache.shape import Buffers
from longspec.cache.stage import Segment, Shape, Stage
from longspec.kernels.boundary import pointer, workspace
from longspec.kernels.team import team

__all__ = ["Texts", "reads"]


_RUN_WORDS = 12
_CODED_WORDS = 9  # pointers of a coded layer, as `_places` gives them


class _Text(ctypes.Structure):
    _fields_ = (
        ("runs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "at", "rows", "put")),
    )


class Span(Protocol):
    """The token positions of one sequence in a pass."""

    @property
    def stage(self) -> Stage: ...
    @property
    def staged(self) -> slice: ...  # their indices in the stage
    @property
    def at(self) -> slice: ...  # their indices in the pass
    @property
    def shift(self) -> int: ...  # the pass's layer i is their layer i + shift, which has the same window


def reads(span: Span) -> bool:
    """Whether the segments of these positions are known before any layer has run."""
    return span.stage.is_known(span.staged) and not (span.shift and span.stage.by_layer)


class Texts:
    """The spans of one pass, all of which the kernel takes."""

    def __init__(self, spans: Sequence[Span], shape: Shape, queries: int, scale: float, softcap: float | None) -> None:
        """queries: the number of query heads."""
        kernel = cpu.kernel()
        if isinstance(kernel, str):
            raise RuntimeError(kernel)
        self._kernel, (self._team, self._threads) = kernel, team()
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

    def read(self, layer: int, made: Tensor, output: Tensor, sinks: Tensor | None = None) -> None:
        """Write keys and values of `made` [r, (H + 2 K) * D and more] to the cache, and attention's output to
        [r, H * D].
        """
        texts = self._prepared[self.read_of[layer]]
        self.begin(made, [layer])
        self._reading.sinks = cpu.sinks_of(sinks, self._reading.key_heads * self._reading.groups)
        at = pointer(output, torch.bfloat16, len(made), None)
        self._kernel.texts_read(
            self._reading, texts, len(texts), layer, 0, len(made), self._workspace(), self._threads, at, self._team
        )

    def begin(self, made: Tensor, layers: Sequence[int]) -> None:
        """Set the query pointer to `made` and mark the staged rows of `layers` as written, for another C function
        that calls the kernel itself.
        """
        self._reading.queries = pointer(made, torch.bfloat16, None, None)
        self._reading.query_row = made.shape[1]
        if len(made) < self._rows or made.shape[1] < self._width:
            raise ValueError(f"a pass of {self._rows} rows of {self._width} can't be of {list(made.shape)}")
        for span in self._spans:
            span.stage.filled([layer + span.shift for layer in layers], span.staged)

    @property
    def call(self) -> tuple[int | None, int, int, int, int | None]:
        """The kernel's address, and its arguments in all layers: queries, sequences, threads and their team."""
        kernel = ctypes.cast(self._kernel.texts_attend, ctypes.c_void_p).value
        return kernel, ctypes.addressof(self._reading), len(self._spans), self._threads, self._team

    def reads(self) -> list[tuple[int, int]]:
        """The kernel's arguments for each kind of layer (`read_of` gives a layer's index): sequences, and the calling
        thread's workspace.
        """
        at = self._workspace()
        return [(ctypes.addressof(texts), at) for texts in self._prepared]

    def _workspace(self) -> int:
        return workspace("attention", self._nbytes).data_ptr()

    def _prepare(self, layer: int) -> ctypes.Array[_Text]:
        """The C structs of all sequences for a layer."""
        texts = []
        for span in self._spans:
            rows = span.at.stop - span.at.start
            runs = [self._run(run, rows, span.shift) for run in span.stage.runs(layer + span.shift, span.staged)]
            words = (ctypes.c_int64 * (_RUN_WORDS * len(runs)))(*[word for run in runs for word in run])
            self._held.append(words)
            put = span.stage.offset + span.staged.start
            texts.append(_Text(ctypes.addressof(words), len(runs), span.at.start, rows, put))
        return (_Text * len(texts))(*texts)

    def _run(self, run: Segment, rows: int, shift: int) -> tuple[int, ...]:
        """A segment as the fields of the kernel's struct, twelve words."""
        limits = [word or 0 for word in cpu.limits(run.bounds, rows, self._held)]
        if run.codec is None:
            capacity = run.layers[0][0].shape[1]
            return self._placed(run, shift), cpu.DENSE, 16, capacity, run.column, run.columns, run.start, *limits
        kind, bits = cpu.kind_of(run.codec), run.codec.bits
        if kind == cpu.GROUPED:
            raise TypeError("codes in groups are read with the rows that queries chose, layer by layer")
        return self._placed(run, shift), kind, bits, 0, run.column, run.columns, run.start, *limits

    def _placed(self, run: Segment, shift: int) -> int:
        """The address of the int64 array of per-layer base pointers, those from layer `shift` on; cached per list of
        tensors.
        """
        tensors = run.layers
        if id(tensors) not in self._places:
            if run.codec is None:
                array = cast(Buffers, run.layers).places
            else:
                kind = cpu.kind_of(run.codec)
                places = [place for codes in run.layers for place in _places(tuple(codes), kind)]
                array = (ctypes.c_int64 * len(places))(*places)
            self._held += (array, tensors)
            self._places[id(tensors)] = ctypes.addressof(array)
        words = 1 if run.codec is None else _CODED_WORDS
        return self._places[id(tensors)] + shift * words * ctypes.sizeof(ctypes.c_int64)


def _places(codes: tuple[Tensor, ...], kind: int) -> list[int]:
    """A layer's base pointers: keys' codes, lower plane, steps and lows, or 0; those of values; and a head's number
    of blocks.
    """
    found, half = [each.data_ptr() for each in codes], len(codes) // 2
    capacity = codes[0].stride(0) // codes[0].stride(1)
    if kind == cpu.DUAL:
        return [*found, capacity]
    sides = [(code, 0, step, *(low or [0])) for code, step, *low in (found[:half], found[half:])]
    return [*sides[0], *sides[1], capacity]
