"""The cache of a model whose layers have heads of different sizes: one cache for each size, with the same texts.

Takes a shape and what makes a cache of one size; gives a cache that answers for all layers. What a cache keeps, and
where a text can be cut, depends on lengths and not on sizes, so that all say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from longspec.cache.stage import Cache, Room, Segment, Shape, Stage, Take

__all__ = ["Grouped", "GroupedStage"]


class Grouped(Cache):
    """Rows of one session."""

    def __init__(self, shape: Shape, caches: Sequence[Cache]) -> None:
        """caches: of `shape.groups`."""
        self.shape, self.caches = shape, list(caches)
        one = self.caches[0]
        self.lossless, self.in_one_piece, self.can_become = one.lossless, one.in_one_piece, one.can_become

    @classmethod
    def of(cls, shape: Shape, make: Callable[[Shape], Cache]) -> Grouped:
        return cls(shape, [make(group) for group in shape.groups])

    @property
    def can_cut_anywhere(self) -> bool:  # type: ignore[override]
        return self.caches[0].can_cut_anywhere

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.caches[0].length

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def tensors(self) -> Iterator[Tensor]:
        for cache in self.caches:
            yield from cache.tensors()

    def open(self) -> GroupedStage:
        return GroupedStage(self.shape, [cache.open() for cache in self.caches])

    def commit(self, stage: GroupedStage, rows: Sequence[int]) -> None:
        for part in stage.stages:  # before the first one is changed
            part.check_complete(rows)
        for cache, part in zip(self.caches, stage.stages, strict=True):
            cache.commit(part, rows)

    def truncate(self, length: int) -> None:
        for cache in self.caches:
            cache.truncate(length)
        self._check()

    def fork(self, length: int) -> Grouped:
        twin = Grouped(self.shape, [cache.fork(length) for cache in self.caches])
        twin._check()
        return twin

    def mark(self) -> None:
        for cache in self.caches:
            cache.mark()

    def room(self, rows: int) -> Room:
        return Room(*map(sum, zip(*(cache.room(rows) for cache in self.caches), strict=True)))

    def take_rows(self, other: Grouped) -> None:
        for cache, theirs in zip(self.caches, other.caches, strict=True):
            cache.take_rows(theirs)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Each cache's own, behind its number."""
        for i, cache in enumerate(self.caches):
            yield from ((f"{i}.{name}", tensor) for name, tensor in cache.state())

    def load_state(self, length: int, take: Take) -> None:
        for i, cache in enumerate(self.caches):
            cache.load_state(length, lambda name, *kind, i=i: take(f"{i}.{name}", *kind))

    def _check(self) -> None:
        lengths = {cache.length for cache in self.caches}
        assert len(lengths) == 1, lengths


class GroupedStage(Stage):
    """A stage of each, with the same rows. A layer is read and put where its size is kept."""

    def __init__(self, shape: Shape, stages: Sequence[Stage]) -> None:
        self.stages, self.length = list(stages), stages[0].length
        self._places = shape.places
        self._layers = shape.layers

    @property
    def by_layer(self) -> bool:  # type: ignore[override]
        return True

    @property
    def depths(self) -> Sequence[int]:
        return self.stages[0].depths

    @property
    def layers(self) -> int:
        return self._layers

    @property
    def offset(self) -> int:
        return self.stages[0].offset

    def add(self, parents: Sequence[int]) -> slice:
        places = [stage.add(parents) for stage in self.stages]
        return places[0]

    def put(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        stage, place = self._of(layer)
        stage.put(place, rows, keys, values)

    def filled(self, layers: Sequence[int], rows: slice) -> None:
        for layer in layers:
            stage, place = self._of(layer)
            stage.filled((place,), rows)

    def parts(self, layer: int, rows: slice, queries: Tensor) -> Iterator[Segment]:
        stage, place = self._of(layer)
        return stage.parts(place, rows, queries)

    def is_known(self, rows: slice) -> bool:
        return all(stage.is_known(rows) for stage in self.stages)

    def runs(self, layer: int, rows: slice) -> Sequence[Segment]:
        stage, place = self._of(layer)
        return stage.runs(place, rows)

    def reads(self, rows: slice) -> list[int] | None:
        return self.stages[0].reads(rows)

    def _of(self, layer: int) -> tuple[Stage, int]:
        group, place = self._places[layer]
        return self.stages[group], place
