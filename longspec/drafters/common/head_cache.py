"""A text's rows as a head reads them: hidden states that wait, and the keys and values of those that are done.

Takes hidden states as the engine hands them over (`Reading.read`) and a function that runs a head's layers; gives what
the layers made of each text's newest row. Rows wait until a draft is asked for, so that a head that isn't used costs a
pass of its layers every 64 rows and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspec.cache.dense import Dense
from longspec.cache.stage import BLOCK, Shape
from longspec.model.decoder import Chunk, Rows
from longspec.types import Writing

__all__ = ["Follow"]


@dataclass(slots=True)
class _Notes:
    """What a head has of one session."""

    cache: Dense
    first: int = 0  # the text's row that its rows begin with: behind a snapshot's, which were never read
    waiting: list[Tensor] = field(default_factory=list)  # [m, width] each: rows that the layers haven't run
    last: Tensor | None = None  # what the layers gave for the newest row

    @property
    def done(self) -> int:
        """The text's rows up to which the layers have run."""
        return self.first + self.cache.length

    @property
    def lacking(self) -> int:
        return sum(map(len, self.waiting))


class Follow:
    """run: the layers, over rows, their hidden states and the tokens behind them; what they gave [r, ...]."""

    def __init__(self, shape: Shape, run: Callable[[Rows, Tensor], Tensor]) -> None:
        self._shape = shape
        self._run = run
        self._notes: WeakKeyDictionary[Writing, _Notes] = WeakKeyDictionary()

    def begin(self, session: Writing) -> None:
        self._notes[session] = _Notes(Dense(self._shape))

    def read(self, session: Writing, features: Tensor) -> None:
        notes, start = self._notes[session], session.cache.length - len(features)
        if start < notes.done + notes.lacking:  # the text was cut back
            notes.cache.truncate(max(0, min(start, notes.done) - notes.first))
            notes.waiting = []
        if start != notes.done + notes.lacking:  # it begins here, or lacks rows: older ones are forgotten
            notes.cache, notes.first, notes.waiting = Dense(self._shape), start, []
        notes.waiting.append(features)
        if notes.lacking >= BLOCK:
            with torch.inference_mode():
                self.catch_up([session])

    def last(self, session: Writing) -> Tensor | None:
        """What the layers gave for the newest row but the last token's own, if that has been read."""
        notes = self._notes.get(session)
        return notes.last if notes is not None and notes.done == len(session.tokens) - 1 else None

    def rooms(self, sessions: Sequence[Writing], limits: Sequence[int]) -> list[int]:
        """The limits, 0 where a text's newest row isn't known, after the layers have caught up with those that bet."""
        self.catch_up([session for session, limit in zip(sessions, limits, strict=True) if limit > 0])
        known = (self.last(session) is not None for session in sessions)
        return [limit if knows else 0 for limit, knows in zip(limits, known, strict=True)]

    def cache(self, session: Writing) -> Dense:
        return self._notes[session].cache

    def catch_up(self, sessions: Sequence[Writing]) -> None:
        """Run the layers over what waits, all sessions in one pass."""
        chunks, stages, features, notes = [], [], [], []
        for session in sessions:
            own = self._notes.get(session)
            if own is None or not own.waiting:
                continue
            start, count = own.done, own.lacking
            stage = own.cache.open()
            staged = stage.add(range(-1, count - 1))
            stages.append(stage)
            chunks.append(Chunk(stage, staged, session.tokens[start + 1 : start + count + 1], start, False))
            features += own.waiting
            notes.append(own)
        if not chunks:
            return
        rows = Rows.of(chunks, self._shape.device)
        made = self._run(rows, torch.cat(features))
        for own, stage, span in zip(notes, stages, rows.spans, strict=True):
            own.cache.commit(stage, range(len(stage.depths)))
            own.waiting, own.last = [], made[span.at.stop - 1]
