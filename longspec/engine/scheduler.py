"""Many texts written side by side: which prompts are prefilled, which texts are decoded, and which wait.

Takes open sessions and gives their commits, forward pass by forward pass. A session joins as soon as another has ended,
and the prompt that is being prefilled shares its passes with the texts that are being decoded: a pass reads all weights
once, whoever uses them. Prompts that begin alike are prefilled alike once: the cache rows that the next prompts have in
common with this one (the trunk) are kept when they are there, and forked (no row is copied).

An error of one text ends that text alone, and this module is the one place that decides so:

    a prompt that can't be opened             `begin` gives the error
    an error that a pass attributes           `Session.error` is set, and the other texts have their commits
    an error of the pass as a whole           the pass is repeated in halves, down to single texts, and what fails alone
    (out of memory, a grammar that fails)     has the error; noise is keyed by position, so that a repeated pass gives
                                              the tokens that the failed one would have given

Knows no file, no name and no order of answers. A session's text doesn't depend on its companions: its noise is keyed by
itself, its drafts are its own, its rows see no other's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, Unpack

from longspec.cache.stage import BLOCK, Cache
from longspec.engine.options import Options
from longspec.engine.session import Session
from longspec.errors import LongspecError, reported
from longspec.text.prompt import Prompt
from longspec.types import Commit

__all__ = ["WIDTH", "Event", "Schedule", "common"]

WIDTH = 16
"""Texts at a time, if nobody says otherwise: the default model's pass takes 15.9 ms with 1 row and 22 with 17."""

Event = Commit | LongspecError
"""What a pass brought to a text: tokens, or the error that ended it."""


@dataclass(slots=True)
class _Trunk:
    """The tokens that several prompts begin with, and a cache that holds their rows."""

    tokens: list[int]
    cache: Cache
    cache_name: str
    long: bool  # the rows are turned for a text beyond a longrope model's first context
    users: set[Session] = field(default_factory=set)  # sessions whose caches share these rows

    def shared(self, session: Session) -> int:
        """The number of rows that the session's text can begin with: 0, or a block at least."""
        length = common(self.tokens, session.tokens[:-1]) if session.long == self.long else 0
        return length if length >= BLOCK else 0


class Passes(Protocol):
    """The engine's part: sessions are opened, and stepped in one forward pass."""

    def open(self, prompt: Prompt, **options: Unpack[Options]) -> Session:
        """A session for this prompt."""
        ...

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
        """The number of sessions that have not ended."""
        return len(self._waiting) + len(self._writing) + (self._reading is not None)

    @property
    def wants(self) -> int:
        """The number of sessions that could begin now, and one more, which waits: so prompts alike are noticed."""
        return max(0, self.width + 1 - len(self))

    def begin(self, prompt: Prompt, options: Options) -> Session | LongspecError:
        """Open a session and add it; the error where the prompt or its options can't be used, of whatever kind."""
        try:
            session = self.engine.open(prompt, **options)
        except Exception as error:  # noqa: BLE001  a wrong type in one prompt must not end the other texts
            return reported(error)
        self.add(session)
        return session

    def add(self, session: Session) -> None:
        """Write the session's text as soon as there is a place for it."""
        self._waiting.append(session)

    def drop(self, session: Session) -> None:
        """Write the session no further; its rows are free as soon as nobody else holds it."""
        self._writing = [one for one in self._writing if one is not session]
        self._waiting = deque(one for one in self._waiting if one is not session)
        if self._reading is session:
            self._reading = None
        self._release_trunk()

    def step(self) -> list[tuple[Session, Event]]:
        """Run one forward pass: the next rows of a prompt, and a step of every text. Sessions that ended have left."""
        while self._reading is None and self._waiting and len(self._writing) < self.width:
            session = self._waiting.popleft()
            self._share(session)
            if session.unfed[1:]:
                self._reading = session
            else:
                self._writing.append(session)
        writing, reading = list(self._writing), self._reading
        events = self._pass(writing, reading) if writing or reading is not None else []
        if reading is not None and reading.error is None:
            self._keep_trunk(reading)
        if reading is not None and (reading.error is not None or not reading.unfed[1:]):
            self._writing.append(reading)
            self._reading = None
        self._writing = [one for one in self._writing if one.finish_reason is None and one.error is None]
        self._release_trunk()
        return events

    def _pass(self, writing: Sequence[Session], reading: Session | None) -> list[tuple[Session, Event]]:
        """Run these texts in one forward pass; where it fails as a whole, in two passes of half the texts each."""
        texts = [*writing] if reading is None else [*writing, reading]
        steps = [session.stats.steps for session in texts]
        commits: Sequence[Commit] = ()
        try:
            if writing:
                commits = self.engine.step(writing, reading, self._stop(reading))
            elif reading is not None:
                self.engine.read(reading, self._stop(reading))
        except Exception as error:  # noqa: BLE001  whatever it is, it must not end the texts that have no part in it
            for session, before in zip(texts, steps, strict=True):
                if session.error is None and (len(texts) == 1 or session.stats.steps != before):
                    session.error = error  # alone, or half committed: nobody knows what its caller has seen
            rest, half = [session for session in texts if session.error is None], len(texts) // 2
            failed = [(session, reported(session.error)) for session in texts if session.error is not None]
            if not rest:
                return [*failed]
            parts = (rest[:half], rest[half:]) if not failed else (rest,)
            return [*failed, *(event for part in parts if part for event in self._again(part, reading))]
        events: list[tuple[Session, Event]] = [
            (session, commit if session.error is None else reported(session.error))
            for session, commit in zip(writing, commits, strict=True)
        ]
        if reading is not None and reading.error is not None:
            events.append((reading, reported(reading.error)))
        return events

    def _again(self, texts: Sequence[Session], reading: Session | None) -> list[tuple[Session, Event]]:
        """Run the texts of one half of a failed pass."""
        writing = [session for session in texts if session is not reading]
        return self._pass(writing, reading if len(writing) < len(texts) else None)

    def _share(self, session: Session) -> None:
        """Let an empty session begin with the trunk's rows, if its text begins with their tokens."""
        trunk = self._trunk
        if trunk is None or session.cache.length or not (length := trunk.shared(session)):
            return
        with suppress(LongspecError, OSError, MemoryError):  # it saves work; without it the rows are prefilled
            session.cache, session.cache_name = trunk.cache.fork(length), trunk.cache_name
            session.cached = session.cache.length
            trunk.users.add(session)

    def _stop(self, reading: Session | None) -> int | None:
        """The row at which the prompt that is prefilled parts from the next one, if a fork should be taken there."""
        if reading is None or not self._waiting or self._waiting[0].long != reading.long:
            return None
        length = common(reading.tokens[:-1], self._waiting[0].tokens[:-1])
        return length if length >= max(BLOCK, reading.cache.length + 1) else None

    def _keep_trunk(self, reading: Session) -> None:
        """Keep the rows that the next prompt begins with, at the moment when these are all the rows there are."""
        if not self._waiting or self._waiting[0].long != reading.long:
            return
        length = common(reading.tokens[:-1], self._waiting[0].tokens[:-1])
        if length >= BLOCK and reading.cache.length == length:
            with suppress(LongspecError, OSError, MemoryError):
                fork = reading.cache.fork(length)
                self._trunk = _Trunk(reading.tokens[:length], fork, reading.cache_name, reading.long, {reading})

    def _release_trunk(self) -> None:
        """Let the trunk's rows go once no text that shares them is left and none that could waits.

        They also go once memory is so short that a cache became a smaller one, which frees nothing while the trunk
        holds the old cache's buffers.
        """
        trunk = self._trunk
        if trunk is None:
            return
        trunk.users.intersection_update(self._writing if self._reading is None else [*self._writing, self._reading])
        smaller = any(session.cache_name != trunk.cache_name for session in trunk.users)
        if smaller or not (trunk.users or any(map(trunk.shared, self._waiting))):
            self._trunk = None


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
