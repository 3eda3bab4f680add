"""Sparse views of a session's KV cache for drafting: a subset of the columns, not copied.

    Window(first, last)   attention sinks and recent positions (StreamingLLM, 2309.17453)
    Pages(count)          the residual window, and the old blocks with the best scores (Quest, 2406.10774)
    Upper()               the upper plane of a dual cache's old blocks, and the residual window (QuantSpec, 2502.10424)

A view wraps a stage: writes pass through, reads see less. It is for drafting, not for verification: keys and values
staged through a view are inexact, and the stage is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from longspec.cache.dense import near_start
from longspec.cache.stage import BLOCK, Cache, Segment, Stage

__all__ = ["Pages", "Upper", "View", "ViewedStage", "Window", "viewed"]


class View(Protocol):
    """Selects the columns of a segment that are read."""

    def known(self, layer: int, run: Segment, length: int) -> list[Segment] | None:
        """`read` for a segment of all layers; None if the selection needs the layer's queries."""
        ...

    def read(self, layer: int, part: Segment, queries: Tensor, length: int) -> Iterator[Segment]:
        """The selected columns of a segment, for rows staged behind `length` committed positions."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """The blocks of the first `first` and the last `last` committed positions, and all staged rows."""

    first: int = BLOCK
    last: int = 8 * BLOCK

    def known(self, layer: int, run: Segment, length: int) -> list[Segment] | None:
        return list(_cut(run, self._ranges(run, length)))

    def read(self, layer: int, part: Segment, queries: Tensor, length: int) -> Iterator[Segment]:
        yield from _cut(part, self._ranges(part, length))

    def _ranges(self, part: Segment, length: int) -> list[tuple[int, int]]:
        head = -(-self.first // BLOCK) * BLOCK - part.start
        return [(0, head), (max(head, (length - self.last) // BLOCK * BLOCK - part.start), part.columns)]


@dataclass(slots=True)
class Pages:
    """The residual window, staged rows, and the `count` old blocks with the best scores. One instance for each session.

    A block's score is bounded by the least and greatest of its keys per channel. A layer's selection is made by the
    first queries after a further block has become old, and kept for 64 tokens, until the next one does. An offloaded
    cache's old blocks aren't paged: that cache selects rows of them itself.
    """

    count: int = 8
    _keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by layer: least, greatest [K, b, D]
    _chosen: dict[int, tuple[int, list[tuple[int, int]]]] = field(default_factory=dict)  # by layer: old blocks, columns

    def known(self, layer: int, run: Segment, length: int) -> list[Segment] | None:
        old = self._old(run, length)
        if not old:
            return [run]
        at, chosen = self._chosen.get(layer, (-1, []))
        return list(_cut(run, [*chosen, (old * BLOCK, run.columns)])) if at == old else None

    def read(self, layer: int, part: Segment, queries: Tensor, length: int) -> Iterator[Segment]:
        old = self._old(part, length)
        if not old:
            yield part
            return
        at, chosen = self._chosen.get(layer, (-1, []))
        if at != old:
            chosen = self._choice(layer, part, old, queries)
            self._chosen[layer] = old, chosen
        yield from _cut(part, [*chosen, (old * BLOCK, part.columns)])

    def _old(self, part: Segment, length: int) -> int:
        """Number of old blocks to select from; 0 for a segment that is read whole: not from position 0, or short, or
        of a cache that selects rows itself.
        """
        old = min((near_start(length) - part.start) // BLOCK, part.columns // BLOCK)
        return 0 if part.start or old <= self.count or part.chosen is not None else old

    def _choice(self, layer: int, part: Segment, old: int, queries: Tensor) -> list[tuple[int, int]]:
        """Column ranges of the selected blocks, adjacent ones merged."""
        least, greatest = self._bounds(layer, part, old)
        readable = torch.ones(len(queries), old, dtype=torch.bool, device=queries.device)
        score = _block_scores(queries, least, greatest, readable).amax(0)
        columns: list[tuple[int, int]] = []
        for block in sorted(score.topk(min(self.count, old)).indices.tolist()):
            first = columns.pop()[0] if columns and columns[-1][1] == block * BLOCK else block * BLOCK
            columns.append((first, (block + 1) * BLOCK))
        return columns

    def _bounds(self, layer: int, part: Segment, old: int) -> tuple[Tensor, Tensor]:
        least, greatest = self._keys.get(layer, (None, None))
        done = 0 if least is None else least.shape[1]
        if done < old:
            keys = torch.cat([piece.keys for piece in part.cut(done * BLOCK, old * BLOCK).pieces()], 1)
            blocks = keys.view(len(keys), -1, BLOCK, keys.shape[2])
            new = blocks.amin(2).float(), blocks.amax(2).float()
            least = new[0] if least is None else torch.cat((least, new[0]), 1)
            greatest = new[1] if greatest is None else torch.cat((greatest, new[1]), 1)
            self._keys[layer] = least, greatest
        assert least is not None
        assert greatest is not None
        return least[:, :old], greatest[:, :old]


class Upper:
    """The upper plane of a dual cache's old blocks: half the bytes."""

    def known(self, layer: int, run: Segment, length: int) -> list[Segment] | None:
        return None if run.is_coded else [run]

    def read(self, layer: int, part: Segment, queries: Tensor, length: int) -> Iterator[Segment]:
        if part.codec is None:
            yield part
            return
        codec, codes = part.codec.upper(part.tensors)
        yield replace(part, layers=(codes,), column=0, codec=codec)


class ViewedStage(Stage):
    """A stage read through a view. Its rows are inexact: it can't be committed."""

    def __init__(self, stage: Stage, view: View, length: int) -> None:
        self._stage, self._view, self._length = stage, view, length
        self._runs: dict[tuple[int, int], list[list[Segment]] | None] = {}  # segments by layer, keyed by rows

    @property
    def depths(self) -> Sequence[int]:
        return self._stage.depths

    @property
    def states(self) -> Any:
        return self._stage.states

    @property
    def layers(self) -> int:
        return self._stage.layers

    @property
    def length(self) -> int:  # type: ignore[override]
        return self._length

    @property
    def offset(self) -> int:
        return self._stage.offset

    def add(self, parents: Sequence[int]) -> slice:
        return self._stage.add(parents)

    def put(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        self._stage.put(layer, rows, keys, values)

    def filled(self, layers: Sequence[int], rows: slice) -> None:
        self._stage.filled(layers, rows)

    def parts(self, layer: int, rows: slice, queries: Tensor) -> Iterator[Segment]:
        for part in self._stage.parts(layer, rows, queries):
            yield from self._view.read(layer, part, queries, self._length)

    def is_known(self, rows: slice) -> bool:
        return self._seen(rows) is not None

    def runs(self, layer: int, rows: slice) -> Sequence[Segment]:
        seen = self._seen(rows)
        assert seen is not None
        return seen[layer]

    def _seen(self, rows: slice) -> list[list[Segment]] | None:
        key = (rows.start, rows.stop)
        if key not in self._runs:
            self._runs[key] = self._look(rows)
        return self._runs[key]

    def _look(self, rows: slice) -> list[list[Segment]] | None:
        """The selected segments of each layer; None if a selection needs queries."""
        if not self._stage.is_known(rows):
            return None
        layers: list[list[Segment]] = []
        for layer in range(self._stage.layers):
            seen = [self._view.known(layer, run, self._length) for run in self._stage.runs(layer, rows)]
            if None in seen:
                return None
            layers.append([run for runs in seen if runs for run in runs])
        return layers


def viewed(cache: Cache, view: View) -> ViewedStage:
    """Open a stage of the cache that reads through `view`."""
    return ViewedStage(cache.open(), view, cache.length)


def _cut(part: Segment, ranges: Iterable[tuple[int, int]]) -> Iterator[Segment]:
    for first, last in ranges:
        first, last = max(0, first), min(last, part.columns)
        if first < last:
            yield part.cut(first, last)


def _block_scores(queries: Tensor, least: Tensor, greatest: Tensor, readable: Tensor) -> Tensor:
    """[q, b]: score of each block for each query [q, H, D], summed over heads; -1 for blocks that it may not read.

    It is an upper bound on the attention scores of the block's keys (Quest, 2406.10774):

        max over positions j of q . k_j  <=  sum over channels d of max(q_d * least_d, q_d * greatest_d)

    least, greatest: [K, b, D], per channel of a block's keys. readable: [q, b] bool. A head's bounds go through a
    softmax over the blocks before the sum, since heads have no common scale.
    """
    q, heads, dim = queries.shape
    grouped = queries.float().reshape(q, len(least), heads // len(least), dim).permute(1, 2, 0, 3)  # [K, G, q, D]
    high, low = greatest.transpose(1, 2)[:, None], least.transpose(1, 2)[:, None]  # [K, 1, D, b]
    bounds = (grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low) * dim**-0.5
    falling = torch.softmax(bounds.masked_fill(~readable, float("-inf")), -1).nan_to_num(0.0)
    return falling.sum((0, 1)).masked_fill(~readable, -1.0)
