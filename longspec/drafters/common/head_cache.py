"""KV cache of a draft head, and its lazy catch-up with the target.

Takes the target's hidden states as the engine hands them over (`Drafter.read`) and a function that runs the head's
layers; gives the layers' output for each session's newest position. Hidden states wait until a draft is asked for, or
for 64 of them (`BLOCK`): a head that isn't used costs one pass of its layers per 64 positions.
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
    """A head's state of one session."""

    cache: Dense
    first: int = 0  # the position of the cache's first row; > 0 behind a snapshot, whose hidden states are unknown
    waiting: list[Tensor] = field(default_factory=list)  # [m, width] each: hidden states that the layers haven't run
    last: Tensor | None = None  # the layers' output for the newest row, and for masks

    @property
    def done(self) -> int:
        """The position up to which the layers have run."""
        return self.first + self.cache.length

    @property
    def lacking(self) -> int:
        """Number of waiting positions."""
        return sum(map(len, self.waiting))


class Follow:
    """KV caches of one head, by session.

    run: runs the head's layers over rows (tokens, each after its hidden state) and hidden states; gives [r, ...].
    masks: rows without token and hidden state that stand behind a session's newest one in each pass, and are dropped.
    """

    def __init__(self, shape: Shape, run: Callable[[Rows, Tensor], Tensor], masks: int = 0) -> None:
        self._shape, self._run, self._masks = shape, run, masks
        self._notes: WeakKeyDictionary[Writing, _Notes] = WeakKeyDictionary()

    def begin(self, session: Writing) -> None:
        self._notes[session] = _Notes(Dense(self._shape))

    def read(self, session: Writing, features: Tensor) -> None:
        notes, start = self._notes[session], session.cache.length - len(features)
        if start < notes.done + notes.lacking:  # the sequence was truncated
            notes.cache.truncate(max(0, min(start, notes.done) - notes.first))
            notes.waiting = []
        if start != notes.done + notes.lacking:  # a first call, or a gap: start anew at this position
            notes.cache, notes.first, notes.waiting = Dense(self._shape), start, []
        notes.waiting.append(features)
        if notes.lacking >= BLOCK:
            with torch.inference_mode():
                self.catch_up([session])

    def last(self, session: Writing) -> Tensor | None:
        """The layers' output for the last committed position, len(tokens) - 2, with masks [1 + masks, ...] for these
        too; None if not caught up with it.
        """
        notes = self._notes.get(session)
        return notes.last if notes is not None and notes.done == len(session.tokens) - 1 else None

    def rooms(self, sessions: Sequence[Writing], limits: Sequence[int]) -> list[int]:
        """Catch up with the sessions that may draft; returns their limits, 0 where the newest position isn't known."""
        self.catch_up([session for session, limit in zip(sessions, limits, strict=True) if limit > 0])
        known = (self.last(session) is not None for session in sessions)
        return [limit if knows else 0 for limit, knows in zip(limits, known, strict=True)]

    def cache(self, session: Writing) -> Dense:
        return self._notes[session].cache

    def catch_up(self, sessions: Sequence[Writing]) -> None:
        """Run the layers over all waiting hidden states, all sessions in one forward pass."""
        chunks, stages, features, notes = [], [], [], []
        for session in sessions:
            own = self._notes.get(session)
            if own is None or not own.waiting:
                continue
            start, count = own.done, own.lacking
            stage = own.cache.open()
            staged = stage.add(range(-1, count + self._masks - 1))
            stages.append(stage)
            tokens = [*session.tokens[start + 1 : start + count + 1], *[0] * self._masks]
            chunks.append(Chunk(stage, staged, tokens, start, False))
            features += own.waiting
            notes.append(own)
        if not chunks:
            return
        rows = Rows.of(chunks, self._shape.device)
        made = self._run(rows, torch.cat(features))
        for own, stage, span in zip(notes, stages, rows.spans, strict=True):
            own.cache.commit(stage, range(len(stage.depths) - self._masks))
            newest = span.at.stop - 1 - self._masks
            own.waiting, own.last = [], made[newest : span.at.stop] if self._masks else made[newest]
