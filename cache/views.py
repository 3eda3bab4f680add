"""Cheap views of a session's own rows, for drafters: some columns of the full stage, and no second copy.

    Window(first, last)   the text's first rows and its last (StreamingLLM, 2309.17453)
    Pages(count)          near rows, and the blocks whose keys may answer the queries best (Quest, 2406.10774)
    Upper()               of a dual cache, the upper plane of old blocks; near rows as they are (QuantSpec, 2502.10424)

A view wraps a stage: what is put goes through, what is read is less. It is for guessing, never for verifying: rows that
were staged through a view are inexact, so that stage is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from longspec.cache.dense import near_start
from longspec.cache.pages import block_scores
from longspec.cache.stage import BLOCK, Cache, Segment, Stage

__all__ = ["Pages", "Upper", "View", "ViewedStage", "Window", "viewed"]


class View(Protocol):
    """Chooses what of a part is read."""

    def known(self, layer: int, run: Segment, length: int) -> list[Segment] | None:
        """As `read`, of what stands in the same place in every layer; None where only the layer's queries can tell."""
        ...

    def read(self, layer: int, part: Segment, queries: Tensor, length: int) -> Iterator[Segment]:
        """What is left of the part, for rows behind a text of `length` rows."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """The blocks that hold the first `first` and the last `last` rows of the text, and all staged rows."""

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
    """Near and staged rows, and of older blocks the `count` that the queries ask for. One for each session.

    A block is judged by the least and the greatest of its keys per channel, which bound its scores. The choice is made
    by the first rows that read a layer when another block has grown old, and kept until the next one has: 64 tokens
    later. Offloaded rows aren't paged: they choose by themselves.
    """

    count: int = 8
    _keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of a layer: least, greatest [K, b, D]
    _chosen: dict[int, tuple[int, list[tuple[int, int]]]] = field(default_factory=dict)  # of a layer

    def known(self, layer: int, run: Segment, length: int) -> list[Segment] | None:
        old = self._old(run, length)
        if not old:
            return [run]
        at, chosen = self._chosen.get(layer, (-1, []))  # of how many old blocks, and their columns
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
        """Blocks of a part of which some are left out; 0 for near rows, the rows of a window, or too few to choose."""
        old = min((near_start(length) - part.start) // BLOCK, part.columns // BLOCK)
        return 0 if part.start or old <= self.count else old

    def _choice(self, layer: int, part: Segment, old: int, queries: Tensor) -> list[tuple[int, int]]:
        """Columns of the chosen blocks, neighbours together."""
        least, greatest = self._bounds(layer, part, old)
        readable = torch.ones(len(queries), old, dtype=torch.bool, device=queries.device)
        score = block_scores(queries, least, greatest, readable).amax(0)
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
    """Of a dual cache's old blocks, the upper plane: half the bytes."""

    def known(self, layer: int, run: Segment, length: int) -> list[Segment] | None:
        return None if run.is_coded else [run]

    def read(self, layer: int, part: Segment, queries: Tensor, length: int) -> Iterator[Segment]:
        if part.codec is None:
            yield part
            return
        codec, codes = part.codec.upper(part.tensors)
        yield replace(part, layers=(codes,), column=0, codec=codec)


class ViewedStage(Stage):
    """A stage of which a view is read. Its rows are inexact: it can't be committed."""

    def __init__(self, stage: Stage, view: View, length: int) -> None:
        self._stage, self._view, self._length = stage, view, length
        self._runs: dict[tuple[int, int], list[list[Segment]] | None] = {}  # of each layer, by rows

    @property
    def depths(self) -> Sequence[int]:
        return self._stage.depths

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

    def filled(self, layer: int, rows: slice) -> None:
        self._stage.filled(layer, rows)

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
        """What is left of each layer's runs; None where one isn't known."""
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
    """A new stage behind the cache's rows that reads them through `view`."""
    return ViewedStage(cache.open(), view, cache.length)


def _cut(part: Segment, ranges: Iterable[tuple[int, int]]) -> Iterator[Segment]:
    for first, last in ranges:
        first, last = max(0, first), min(last, part.columns)
        if first < last:
            yield part.cut(first, last)
