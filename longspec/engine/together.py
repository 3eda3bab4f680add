"""Texts of several threads in shared forward passes.

A thread that waits for its text runs the passes for everyone's; the others wait until their own text has come further,
or until that thread is done with its own and one of them goes on. No thread is started, and none runs when nobody
waits: a text whose reader stays away gets a few commits ahead of it, and no more.

A thread reads its own prompt, and the thread that runs the passes makes the answers: what waits for the model's lock in
between waits for passes, as the running thread takes it again at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Condition
from typing import Protocol

from longspec.engine.answer import Answer
from longspec.engine.opening import Prepared
from longspec.engine.scheduler import Passes, Schedule
from longspec.engine.session import Session
from longspec.errors import LongspecError
from longspec.types import Commit

__all__ = ["Together"]

_AHEAD = 16
"""Commits that a text may have before its reader."""


class Writes(Passes, Protocol):
    """The engine's part."""

    def answer(self, session: Session) -> Answer:
        """The answer of a session that has ended."""
        ...


@dataclass(eq=False, slots=True)
class _Text:
    """A thread's text: asked for, then a session whose commits wait to be read."""

    prepared: Prepared
    whole: bool  # the reader waits for its end
    session: Session | None = None
    answer: Answer | None = None  # of a whole text
    commits: deque[Commit] = field(default_factory=deque)
    error: Exception | None = None
    over: bool = False
    is_scheduled: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether its reader has something to read."""
        return self.over or (bool(self.commits) and not self.whole)


class Together:
    """The texts that threads have asked an engine for."""

    def __init__(self, engine: Writes) -> None:
        self._engine = engine
        self._schedule = Schedule(engine)
        self._texts: dict[Session, _Text] = {}  # those in the schedule; the leader's alone
        self._changed = Condition()  # guards the fields below, and every text's
        self._coming: deque[_Text] = deque()  # to be scheduled, by the leader
        self._going: deque[_Text] = deque()  # to be taken out
        self._is_led = False

    def answer(self, prepared: Prepared) -> Answer:
        """The whole answer. Raises what `Engine.begin` and `Engine.step` raise."""
        text = _Text(prepared, whole=True)
        for _ in self._written(text):
            pass
        assert text.answer is not None
        return text.answer

    def stream(self, prepared: Prepared) -> Iterator[Commit]:
        """The commits as they come. Raises what `answer` raises."""
        return self._written(_Text(prepared, whole=False))

    def _written(self, text: _Text) -> Iterator[Commit]:
        try:
            while True:
                self._wait(text)
                while text.commits:
                    yield text.commits.popleft()
                if text.over:
                    if text.error is not None:
                        raise text.error
                    return
        finally:
            with self._changed:
                if not text.over:
                    self._going.append(text)
                    text.over = True

    def _wait(self, text: _Text) -> None:
        """Return when the text is ready, with the passes run here or by another thread."""
        with self._changed:
            if not (text.is_scheduled or text.is_ready):
                text.is_scheduled = True
                self._coming.append(text)
            while self._is_led and not text.is_ready:
                self._changed.wait()
            if text.is_ready:
                return
            self._is_led = True
        try:
            while not text.is_ready:
                self._pass()
        finally:
            with self._changed:
                self._is_led = False
                self._changed.notify_all()

    def _pass(self) -> None:
        """Take texts in and out, and run one pass."""
        with self._changed:
            coming, going = [text for text in self._coming if not text.over], [*self._going]
            self._coming.clear()
            self._going.clear()
        for text in going:
            if text.session is not None and self._texts.pop(text.session, None) is not None:
                self._schedule.drop(text.session)
        for text in coming:
            self._begin(text)
        ready = any(text.is_ready for text in coming)
        for session, event in self._schedule.step():
            ready |= self._tell(self._texts[session], event)
        if ready:
            with self._changed:
                self._changed.notify_all()

    def _begin(self, text: _Text) -> None:
        """Open a new text's session, and schedule it; one that was out for a while comes back as it is."""
        try:
            if text.session is None:
                text.session = self._engine.begin(text.prepared)
        except Exception as error:  # noqa: BLE001  it belongs to the thread that asked
            text.error, text.over = error, True
            return
        self._texts[text.session] = text
        self._schedule.add(text.session)

    def _tell(self, text: _Text, event: Commit | LongspecError) -> bool:
        """Hand a pass's outcome to the text; whether its reader may go on."""
        assert text.session is not None
        if text.whole and isinstance(event, Commit) and event.finish_reason is not None:
            text.answer = self._engine.answer(text.session)
        with self._changed:
            if isinstance(event, LongspecError):
                text.error, text.over = text.session.error or event, True
            else:
                if not text.whole:
                    text.commits.append(event)
                text.over = event.finish_reason is not None
            if text.over:
                del self._texts[text.session]
            elif not text.whole and len(text.commits) >= _AHEAD:
                del self._texts[text.session]
                self._schedule.drop(text.session)
                text.is_scheduled = False
            return text.is_ready
