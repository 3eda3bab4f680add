"""The cache of a hybrid: rows of its attention layers in any kind of cache, and the states of the others.

Takes a cache of rows; gives one that answers for both. Attention's keys and values may be codes or lie elsewhere;
states are fp32 in every kind. What a text can be cut back to is what both can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from longspec.cache.recurrent import States
from longspec.cache.stage import Cache, Room, Segment, Shape, Stage, Take

__all__ = ["Hybrid", "HybridStage"]


class Hybrid(Cache):
    """Rows and states of one session."""

    def __init__(self, shape: Shape, rows: Cache) -> None:
        self.rows, self.states = rows, States(shape)
        self.lossless, self.in_one_piece = rows.lossless, rows.in_one_piece
        self.can_become = rows.can_become if shape.windows else ()

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.rows.length

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.states.nbytes

    def tensors(self) -> Iterator[Tensor]:
        yield from self.rows.tensors()
        yield from self.states.tensors()

    def open(self) -> HybridStage:
        return HybridStage(self)

    def commit(self, stage: HybridStage, rows: Sequence[int]) -> None:
        self.states.check(stage.states, rows)
        self.rows.commit(stage.rows, rows)
        self.states.commit(stage.states, rows)

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"can't truncate {self.length} rows to {length}")
        reached = self.states.reach(length)
        self.rows.truncate(reached)
        while self.rows.length != (reached := self.states.reach(self.rows.length)):
            self.rows.truncate(reached)
        self.states.truncate(reached)

    def fork(self, length: int) -> Hybrid:
        reached = self.states.reach(min(length, self.length))
        rows = self.rows.fork(reached)
        while rows.length != (reached := self.states.reach(rows.length)):
            rows = self.rows.fork(reached)
        twin = Hybrid(self.states.shape, rows)
        twin.states = self.states.fork(reached)
        return twin

    def mark(self) -> None:
        self.rows.mark()
        self.states.mark()

    def room(self, rows: int) -> Room:
        """What the rows need, and the states of a text."""
        room = self.rows.room(rows)
        return room._replace(device=room.device + States.room(self.states.spec))

    def take_rows(self, other: Hybrid) -> None:
        self.rows.take_rows(other.rows)
        self.states = other.states

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.rows.state()
        yield from self.states.state()

    def load_state(self, length: int, take: Take) -> None:
        self.rows.load_state(length, take)
        self.states.load_state(length, take)


class HybridStage(Stage):
    """A stage of each, with the same rows."""

    def __init__(self, cache: Hybrid) -> None:
        self.rows, self.states = cache.rows.open(), cache.states.open()
        self.length = cache.length

    @property
    def by_layer(self) -> bool:  # type: ignore[override]
        return bool(self.rows.by_layer)

    @property
    def depths(self) -> Sequence[int]:
        depths: Sequence[int] = self.rows.depths
        return depths

    @property
    def layers(self) -> int:
        return int(self.rows.layers)

    @property
    def offset(self) -> int:
        return int(self.rows.offset)

    def add(self, parents: Sequence[int]) -> slice:
        rows: slice = self.rows.add(parents)
        self.states.add(parents)
        return rows

    def put(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        self.rows.put(layer, rows, keys, values)

    def filled(self, layers: Sequence[int], rows: slice) -> None:
        self.rows.filled(layers, rows)

    def parts(self, layer: int, rows: slice, queries: Tensor) -> Iterator[Segment]:
        parts: Iterator[Segment] = self.rows.parts(layer, rows, queries)
        return parts

    def is_known(self, rows: slice) -> bool:
        return bool(self.rows.is_known(rows))

    def runs(self, layer: int, rows: slice) -> Sequence[Segment]:
        runs: Sequence[Segment] = self.rows.runs(layer, rows)
        return runs

    def reads(self, rows: slice) -> list[int] | None:
        reads: list[int] | None = self.rows.reads(rows)
        return reads
