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

from longspec.cache.codes import DualCodec
from longspec.cache.dense import near_start
from longspec.cache.pages import block_scores
from longspec.cache.stage import BLOCK, Cache, CodedPart, Part, Stage

__all__ = ["Pages", "Upper", "View", "ViewedStage", "Window", "viewed"]


class View(Protocol):
    """Chooses what of a part is read."""

    def read(self, layer: int, part: Part | CodedPart, queries: Tensor, length: int) -> Iterator[Part | CodedPart]:
        """What is left of the part, for rows behind a text of `length` rows."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """The blocks that hold the first `first` and the last `last` rows of the text, and all staged rows."""

    first: int = BLOCK
    last: int = 8 * BLOCK

    def read(self, layer: int, part: Part | CodedPart, queries: Tensor, length: int) -> Iterator[Part | CodedPart]:
        head = -(-self.first // BLOCK) * BLOCK - part.start
        recent = max(head, (length - self.last) // BLOCK * BLOCK - part.start)
        yield from _cut(part, [(0, head), (recent, part.columns)])


@dataclass(slots=True)
class Pages:
    """Near and staged rows, and of older blocks the `count` that the queries ask for. One for each session.

    A block is judged by the least and the greatest of its keys per channel, which bound its scores. The choice is made
    by the first rows that read a layer after a commit, and kept until the next. Offloaded rows aren't paged: they
    choose by themselves.
    """

    count: int = 8
    _keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # per layer: least, greatest [K, b, D]
    _chosen: dict[int, tuple[int, list[int]]] = field(default_factory=dict)  # per layer: length of the text, blocks

    def read(self, layer: int, part: Part | CodedPart, queries: Tensor, length: int) -> Iterator[Part | CodedPart]:
        old = (near_start(length) - part.start) // BLOCK
        if part.start or old <= self.count:  # the rows of a window, near rows, or too few to leave any out
            yield part
            return
        old = min(old, part.columns // BLOCK)
        yield from _cut(part, [(b * BLOCK, (b + 1) * BLOCK) for b in self._choice(layer, part, old, queries, length)])
        yield from _cut(part, [(old * BLOCK, part.columns)])

    def _choice(self, layer: int, part: Part | CodedPart, old: int, queries: Tensor, length: int) -> list[int]:
        at, chosen = self._chosen.get(layer, (-1, []))
        if at != length:
            least, greatest = self._bounds(layer, part, old)
            readable = torch.ones(len(queries), old, dtype=torch.bool, device=queries.device)
            score = block_scores(queries, least, greatest, readable).amax(0)
            chosen = sorted(score.topk(min(self.count, old)).indices.tolist())
            self._chosen[layer] = (length, chosen)
        return chosen

    def _bounds(self, layer: int, part: Part | CodedPart, old: int) -> tuple[Tensor, Tensor]:
        least, greatest = self._keys.get(layer, (None, None))
        done = 0 if least is None else least.shape[1]
        if done < old:
            keys = torch.cat([piece.keys for piece in part.cut(done * BLOCK, old * BLOCK).pieces()], 1).float()
            blocks = keys.view(len(keys), -1, BLOCK, keys.shape[2])
            new = blocks.amin(2), blocks.amax(2)
            least = new[0] if least is None else torch.cat((least, new[0]), 1)
            greatest = new[1] if greatest is None else torch.cat((greatest, new[1]), 1)
            self._keys[layer] = least, greatest
        assert least is not None
        assert greatest is not None
        return least[:, :old], greatest[:, :old]


class Upper:
    """Of a dual cache's old blocks, the upper plane: half the bytes."""

    def read(self, layer: int, part: Part | CodedPart, queries: Tensor, length: int) -> Iterator[Part | CodedPart]:
        if isinstance(part, CodedPart) and isinstance(part.codec, DualCodec):
            codec, codes = part.codec.upper(part.codes)
            part = replace(part, codec=codec, codes=codes)
        yield part


class ViewedStage:
    """A stage of which a view is read. Its rows are inexact: it can't be committed."""

    def __init__(self, stage: Stage, view: View, length: int) -> None:
        self._stage, self._view, self._length = stage, view, length

    @property
    def depths(self) -> Sequence[int]:
        return self._stage.depths

    def add(self, parents: Sequence[int]) -> slice:
        return self._stage.add(parents)

    def put(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        self._stage.put(layer, rows, keys, values)

    def parts(self, layer: int, rows: slice, queries: Tensor) -> Iterator[Part | CodedPart]:
        for part in self._stage.parts(layer, rows, queries):
            yield from self._view.read(layer, part, queries, self._length)


def viewed(cache: Cache, view: View) -> ViewedStage:
    """A new stage behind the cache's rows that reads them through `view`."""
    return ViewedStage(cache.open(), view, cache.length)


def _cut(part: Part | CodedPart, ranges: Iterable[tuple[int, int]]) -> Iterator[Part | CodedPart]:
    for first, last in ranges:
        first, last = max(0, first), min(last, part.columns)
        if first < last:
            yield part.cut(first, last)
