"""Many texts written side by side: who is read, who is written, who waits.

Takes open sessions and gives their commits, pass by pass. A session joins as soon as another has ended, and the prompt
that is being read shares its passes with the texts that are being written: a pass reads all weights once, whoever uses
them. Prompts that begin alike are read alike once: the rows that the next prompts have in common with this one are kept
when they are there, and forked (no row is copied).

Knows no file, no name and no order of answers. A session's text doesn't depend on its companions: its noise is keyed by
itself, its drafts are its own, its rows see no other's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from longspec.cache.stage import BLOCK, Cache
from longspec.engine.session import Session
from longspec.types import Commit

__all__ = ["WIDTH", "Schedule", "common"]

WIDTH = 16
"""Texts at a time, if nobody says otherwise: the default model's pass takes 15.9 ms with 1 row and 22 with 17."""


@dataclass(frozen=True, slots=True)
class _Trunk:
    """What several prompts begin with, and its rows."""

    tokens: list[int]
    cache: Cache


class Passes(Protocol):
    """What the engine does in one pass."""

    def step(
        self, sessions: Sequence[Session], reading: Session | None = None, stop: int | None = None
    ) -> list[Commit]:
        """A step of every session, and the next rows of a prompt, up to row `stop`."""
        ...

    def read(self, session: Session, stop: int | None = None) -> None:
        """The next rows of a prompt alone."""
        ...


class Schedule:
    """Sessions of one engine, at most `width` in a pass; the others wait in the order in which they came."""

    def __init__(self, engine: Passes, width: int = WIDTH) -> None:
        self.engine = engine
        self.width = width
        self._waiting: deque[Session] = deque()
        self._reading: Session | None = None
        self._writing: list[Session] = []
        self._trunk: _Trunk | None = None

    def __len__(self) -> int:
        """How many sessions have not ended."""
        return len(self._waiting) + len(self._writing) + (self._reading is not None)

    @property
    def wants(self) -> int:
        """How many more sessions could begin now; one more is kept waiting, so that prompts alike are noticed."""
        return max(0, self.width + 1 - len(self))

    def add(self, session: Session) -> None:
        """It is written as soon as there is a place for it."""
        self._waiting.append(session)

    def drop(self, session: Session) -> None:
        """It isn't written on, wherever it stands; its rows are free as soon as nobody else holds it."""
        self._writing = [one for one in self._writing if one is not session]
        self._waiting = deque(one for one in self._waiting if one is not session)
        if self._reading is session:
            self._reading = None

    def step(self) -> list[tuple[Session, Commit]]:
        """One pass: the next rows of a prompt, and a step of every text; what the texts got. Ended ones have left."""
        while self._reading is None and self._waiting and len(self._writing) < self.width:
            session = self._begin(self._waiting.popleft())
            if session.unfed[1:]:
                self._reading = session
            else:
                self._writing.append(session)
        writing, reading = list(self._writing), self._reading
        commits = []
        if writing:
            commits = self.engine.step(writing, reading, self._stop(reading))
        elif reading is not None:
            self.engine.read(reading, self._stop(reading))
        if reading is not None:
            self._keep(reading)
            if not reading.unfed[1:]:
                self._writing.append(reading)
                self._reading = None
        self._writing = [session for session in self._writing if session.finish_reason is None]
        return list(zip(writing, commits, strict=True))

    def _begin(self, session: Session) -> Session:
        """Give it the rows that are there already."""
        trunk = self._trunk
        if trunk is not None and session.cache.length == 0:
            length = common(trunk.tokens, session.tokens[:-1])
            if length >= BLOCK:
                session.cache = trunk.cache.fork(length)
                session.cached = session.cache.length
        return session

    def _stop(self, reading: Session | None) -> int | None:
        """Where the prompt that is read parts from the next one, if a fork should be taken there."""
        if reading is None or not self._waiting:
            return None
        length = common(reading.tokens[:-1], self._waiting[0].tokens[:-1])
        return length if length >= max(BLOCK, reading.cache.length + 1) else None

    def _keep(self, reading: Session) -> None:
        """Keep the rows that the next prompt begins with, at the moment when these are all the rows there are."""
        if not self._waiting:
            return
        length = common(reading.tokens[:-1], self._waiting[0].tokens[:-1])
        if length >= BLOCK and reading.cache.length == length:
            self._trunk = _Trunk(reading.tokens[:length], reading.cache.fork(length))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens they begin with alike."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
