"""The scheduler: which prompts are prefilled, which sequences are decoded, and which wait.

Takes open sessions and gives their commits, forward pass by forward pass (continuous batching). A session joins as
soon as another has ended, and the prompt in prefill shares its passes with the sequences in decoding: a pass reads
all weights once for all of them. A common prefix of several prompts is prefilled once: its cache rows (the trunk) are
kept when they are complete, and forked without a copy.

An error of one sequence ends that sequence alone, and this module is the one place that decides so:

    a prompt that can't be opened             `begin` gives the error
    an error that a pass attributes           `Session.error` is set, and the other sequences have their commits
    an error of the pass as a whole           the pass is repeated in halves, down to single sequences, and what fails
    (out of memory, a grammar that fails)     alone has the error; noise is keyed by position, so that a repeated pass
                                              gives the tokens that the failed one would have given

Knows no file, no name and no order of answers. A session's tokens don't depend on its companions: its noise has its
own key, its drafts are its own, and its positions attend to no other sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, Unpack

from longspec.cache.stage import BLOCK, Cache
from longspec.engine.opening import Prepared
from longspec.engine.options import Options
from longspec.engine.prefix_cache import Prefixes, common
from longspec.engine.prefix_shelf import Shelf
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
    """The common prefix of several prompts, and a cache that holds its rows."""

    tokens: list[int]
    cache: Cache
    cache_name: str
    long: bool  # rotated for a sequence beyond a longrope model's original context
    users: set[Session] = field(default_factory=set)  # sessions whose caches share these rows

    def shared(self, session: Session) -> int:
        """The rows that the session can share: 0, or a block at least."""
        length = common(self.tokens, session.tokens[:-1]) if session.long == self.long else 0
        return length if length >= BLOCK else 0


class Passes(Protocol):
    """The engine's part: opens sessions, and steps them in one forward pass."""

    cache_name: str
    most_texts: int | None  # that a memory plan holds side by side; None: no limit

    def empty_cache(self) -> Cache:
        """A cache of that kind."""
        ...

    def prepare(self, prompt: Prompt, **options: Unpack[Options]) -> Prepared:
        """Read a prompt; any thread may."""
        ...

    def begin(self, prepared: Prepared) -> Session:
        """Open a session for it."""
        ...

    def step(
        self, sessions: Sequence[Session], reading: Session | None = None, stop: int | None = None
    ) -> list[Commit]:
        """Step every session, and prefill the next chunk of a prompt, up to position `stop`, in one pass."""
        ...

    def read(self, session: Session, stop: int | None = None) -> None:
        """Prefill a prompt's next chunk in a pass of its own."""
        ...


class Schedule:
    """The sessions of one engine, at most `width` in a pass; the others wait in order of arrival.

    kept: bytes of finished texts' rows that later prompts may share; shelf: files for those that this doesn't hold.
    """

    def __init__(self, engine: Passes, width: int = WIDTH, kept: int = 0, shelf: Shelf | None = None) -> None:
        self.engine = engine
        self.width = width if engine.most_texts is None else min(width, engine.most_texts)
        self._waiting: deque[Session] = deque()
        self._reading: Session | None = None
        self._writing: list[Session] = []
        self._trunk: _Trunk | None = None
        self.prefixes = Prefixes(kept, engine.cache_name, engine.empty_cache, shelf)
        self.prefilled = 0  # tokens of prompts, in all passes so far

    def __len__(self) -> int:
        """The number of unfinished sessions."""
        return len(self._waiting) + len(self._writing) + (self._reading is not None)

    @property
    def reading(self) -> Session | None:
        """The session whose prompt is being prefilled."""
        return self._reading

    @property
    def wants(self) -> int:
        """The number of sessions that could begin now, plus one to wait, so that common prefixes are noticed."""
        return max(0, self.width + 1 - len(self))

    def begin(self, prompt: Prompt, options: Options) -> Session | LongspecError:
        """Open a session and add it; returns the error, of any kind, where the prompt or its options are invalid."""
        try:
            prepared = self.engine.prepare(prompt, **options)
        except Exception as error:  # noqa: BLE001  a wrong type in one prompt must not end the other sequences
            return reported(error)
        return self.join(prepared)

    def join(self, prepared: Prepared) -> Session | LongspecError:
        """Begin a session whose prompt has been read; returns the error where that fails."""
        try:
            session = self.engine.begin(prepared)
        except Exception as error:  # noqa: BLE001  as above
            return reported(error)
        self.add(session)
        return session

    def add(self, session: Session) -> None:
        """Queue the session; it starts as soon as a slot is free."""
        self._waiting.append(session)

    def drop(self, session: Session) -> None:
        """Remove the session; its rows are freed once no other session shares them."""
        self._writing = [one for one in self._writing if one is not session]
        self._waiting = deque(one for one in self._waiting if one is not session)
        if self._reading is session:
            self._reading = None
        self._release_trunk()

    def step(self) -> list[tuple[Session, Event]]:
        """Run one forward pass: a prompt's next chunk and a step of every sequence. Finished sessions are removed."""
        while self._reading is None and self._waiting and len(self._writing) < self.width:
            session = self._waiting.popleft()
            self._share(session)
            if session.unfed[1:]:
                self._reading = session
            else:
                self._writing.append(session)
        writing, reading = list(self._writing), self._reading
        start = 0 if reading is None else reading.cache.length
        events = self._pass(writing, reading) if writing or reading is not None else []
        if reading is not None and reading.error is None:
            self.prefilled += reading.cache.length - start
            self._keep_trunk(reading)
        if reading is not None and (reading.error is not None or not reading.unfed[1:]):
            self._writing.append(reading)
            self._reading = None
        for session in self._writing:
            if session.finish_reason is not None and session.error is None:
                self.prefixes.keep(session)
        self._writing = [one for one in self._writing if one.finish_reason is None and one.error is None]
        self._release_trunk()
        return events

    def _pass(self, writing: Sequence[Session], reading: Session | None) -> list[tuple[Session, Event]]:
        """Run these sessions in one forward pass; where it fails as a whole, in two passes of half
        the sessions each.
        """
        texts = [*writing] if reading is None else [*writing, reading]
        steps = [session.stats.steps for session in texts]
        commits: Sequence[Commit] = ()
        try:
            if writing:
                commits = self.engine.step(writing, reading, self._stop(reading))
            elif reading is not None:
                self.engine.read(reading, self._stop(reading))
        except Exception as error:  # noqa: BLE001  no error may end the sequences that have no part in it
            for session, before in zip(texts, steps, strict=True):
                if session.error is None and (len(texts) == 1 or session.stats.steps != before):
                    session.error = error  # alone, or half committed: its caller may have seen part of the step
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
        """Run one half of a failed pass."""
        writing = [session for session in texts if session is not reading]
        return self._pass(writing, reading if len(writing) < len(texts) else None)

    def _share(self, session: Session) -> None:
        """Give an empty session the rows of its prefix that the trunk or a finished text has."""
        if session.cache.length:
            return
        trunk = self._trunk
        length = 0 if trunk is None else trunk.shared(session)
        if trunk is None or self.prefixes.shared(session) > length:
            self.prefixes.give(session)
        elif length:
            self._fork(session, trunk, length)

    def _fork(self, session: Session, trunk: _Trunk, length: int) -> None:
        with suppress(LongspecError, OSError, MemoryError):  # only an optimisation: without it the rows are prefilled
            session.cache, session.cache_name = trunk.cache.fork(length), trunk.cache_name
            session.cached = session.cache.length
            trunk.users.add(session)

    def _stop(self, reading: Session | None) -> int | None:
        """The position at which the prompt in prefill diverges from the next one, if a fork should be taken there."""
        if reading is None or not self._waiting or self._waiting[0].long != reading.long:
            return None
        length = common(reading.tokens[:-1], self._waiting[0].tokens[:-1])
        return length if length >= max(BLOCK, reading.cache.length + 1) else None

    def _keep_trunk(self, reading: Session) -> None:
        """Keep the prefix shared with the next prompt, at the moment when the cache holds exactly these rows."""
        if not self._waiting or self._waiting[0].long != reading.long:
            return
        length = common(reading.tokens[:-1], self._waiting[0].tokens[:-1])
        if length >= BLOCK and reading.cache.length == length:
            with suppress(LongspecError, OSError, MemoryError):
                fork = reading.cache.fork(length)
                self._trunk = _Trunk(reading.tokens[:length], fork, reading.cache_name, reading.long, {reading})

    def _release_trunk(self) -> None:
        """Free the trunk's rows once no session shares them and none that could is waiting.

        They are also freed once the memory guard has converted a cache, which frees nothing while the trunk holds the
        old cache's buffers.
        """
        trunk = self._trunk
        if trunk is None:
            return
        trunk.users.intersection_update(self._writing if self._reading is None else [*self._writing, self._reading])
        smaller = any(session.cache_name != trunk.cache_name for session in trunk.users)
        if smaller or not (trunk.users or any(map(trunk.shared, self._waiting))):
            self._trunk = None
