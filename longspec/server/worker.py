"""The one thread that owns an engine, and writes the texts of all requests side by side.

Takes orders from any thread, through a queue; tells each order what comes of it: Opened, Commits, and at last Ended or
an exception. Told in this thread: whoever listens elsewhere brings it there. Knows no HTTP and no event loop.

The engine is loaded here too: torch's threads and settings belong to the thread that first used them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread

from longspec.engine.answer import Answer
from longspec.engine.engine import Engine
from longspec.engine.options import Options
from longspec.engine.scheduler import WIDTH, Schedule
from longspec.engine.session import Session
from longspec.errors import LongspecError
from longspec.text.prompt import Prompt
from longspec.types import Commit

__all__ = ["Ended", "Event", "Opened", "Order", "Worker"]


@dataclass(frozen=True, slots=True)
class Opened:
    """The prompt is understood, and the text waits for its place."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The text is whole, or was ended with what it has."""

    answer: Answer
    notes: tuple[str, ...]


Event = Opened | Commit | Ended | Exception


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """One text that is wanted. began: from when its first token was waited for, if not from when it was opened."""

    prompt: Prompt
    options: Options
    tell: Callable[[Event], None]
    began: float | None = None


class Worker:
    """Loads what `load` gives, then writes at most `width` texts at a time until it is stopped."""

    def __init__(self, load: Callable[[], Engine], width: int = WIDTH) -> None:
        self.width = width
        self.loaded: Future[Engine] = Future()
        self._load = load
        self._sessions: dict[Order, Session] = {}
        self._orders: dict[Session, Order] = {}
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._going = True
        self._thread = Thread(target=self._run, name="longspec engine", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many texts are open."""
        return len(self._orders)

    def write(self, order: Order) -> None:
        self._inbox.put(partial(self._open, order))

    def end(self, order: Order) -> None:
        """The text ends here, with what it has."""
        self._inbox.put(partial(self._end, order))

    def drop(self, order: Order) -> None:
        """Nobody waits for it any longer: it isn't written on, and nothing more is told."""
        self._inbox.put(partial(self._forget, order))

    def stop(self, seconds: float | None = None) -> None:
        """Ends the thread after the pass that is running; waits so long for it."""
        self._inbox.put(self._halt)
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._engine = self._load()
        except BaseException as error:  # noqa: BLE001  a signal too: whoever waits for the engine raises it again
            self.loaded.set_exception(error)
            return
        self._schedule = Schedule(self._engine, self.width)
        self.loaded.set_result(self._engine)
        while self._going:
            self._take()
            if self._schedule:
                self._pass()

    def _take(self) -> None:
        """Do what was asked for meanwhile; with no text to write, wait for that."""
        try:
            if not self._schedule:
                self._inbox.get()()
            while self._going:
                self._inbox.get_nowait()()
        except Empty:
            pass

    def _pass(self) -> None:
        """Run one forward pass; each text that it was for is told its tokens, or the error that ended that text."""
        for session, event in self._schedule.step():
            order = self._orders[session]
            if isinstance(event, LongspecError):
                self._forget(order)
                order.tell(event)
                continue
            order.tell(event)
            if event.finish_reason is not None:
                self._close(order)

    def _open(self, order: Order) -> None:
        session = self._schedule.begin(order.prompt, order.options)
        if isinstance(session, LongspecError):  # what can't be opened is told to whoever asked, and the rest goes on
            order.tell(session)
            return
        self._sessions[order], self._orders[session] = session, order
        order.tell(Opened(session.prompt_length))

    def _end(self, order: Order) -> None:
        session = self._sessions.get(order)
        if session is None:
            return
        self._schedule.drop(session)
        order.tell(session.interrupt())
        self._close(order)

    def _close(self, order: Order) -> None:
        session = self._sessions[order]
        answer = self._engine.answer(session, order.began)
        self._forget(order)
        order.tell(Ended(answer, tuple(session.notes)))

    def _forget(self, order: Order) -> None:
        session = self._sessions.pop(order, None)
        if session is not None:
            del self._orders[session]
            self._schedule.drop(session)

    def _halt(self) -> None:
        self._going = False
