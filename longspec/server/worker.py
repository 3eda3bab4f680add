"""The thread that owns the engine and decodes the sequences of all requests side by side.

Takes orders from any thread, through a queue; reports each order's events: Opened, Reading while its prompt is
prefilled, Commits, and finally Ended or an exception. Callbacks run in its threads: the receiver forwards them to its
own. Knows no HTTP and no event loop.

    order -> a reading thread: tokens, grammar -> the engine's thread: passes -> events

Prompts are read in threads of their own, short and long ones apart: a prompt of megabytes takes seconds, in which no
text that is written waits, and no short prompt. A reading that hangs holds back nobody's end: nothing waits for these
threads, and what was abandoned meanwhile is dropped.

The engine is loaded here too: torch's thread settings belong to the thread that first used them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from longspec.engine.answer import Answer
from longspec.engine.conversation import message_of
from longspec.engine.engine import Engine
from longspec.engine.memory_guard import release
from longspec.engine.opening import Prepared
from longspec.engine.options import Options
from longspec.engine.prefix_shelf import Shelf
from longspec.engine.prompt_cache import identity
from longspec.engine.scheduler import WIDTH, Schedule
from longspec.engine.session import Session
from longspec.errors import LongspecError, reported
from longspec.server.lane import Lane
from longspec.text.prompt import Prompt
from longspec.text.turns import Message
from longspec.types import Commit

__all__ = [
    "LONG_PROMPT",
    "SHELF_SECONDS",
    "SHELF_TIMES",
    "Ended",
    "Event",
    "Opened",
    "Order",
    "Reading",
    "UnreadError",
    "Worker",
]

_Told = TypeVar("_Told")

LONG_PROMPT = 1 << 16
"""Characters of a prompt that others aren't kept waiting for: reading so many takes .1 s."""


SHELF_SECONDS = 2.0
"""In which a worker that ends puts kept rows into its folder."""

SHELF_TIMES = 10
"""As much as may be kept in memory, a folder may hold."""


class UnreadError(LongspecError):
    """The text was ended while its prompt was being read."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The prompt is valid, and the sequence is queued."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Reading:
    """So many of the prompt's tokens that no cache had are prefilled, and there is more of it."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is complete, or was ended early."""

    answer: Answer
    notes: tuple[str, ...]
    message: Message | None  # the answer as one of a conversation, if anything was written


Event = Opened | Reading | Commit | Ended | Exception


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """A sequence to decode. began: when the request arrived, on `perf_counter`'s clock; if left out, when the session
    was opened.
    """

    prompt: Prompt
    options: Options
    tell: Callable[[Event], None]
    began: float | None = None

    @property
    def is_long(self) -> bool:
        """Whether reading the prompt takes so long that others aren't kept waiting for it."""
        texts = [self.prompt] if isinstance(self.prompt, str) else [each["content"] for each in self.prompt]
        schemas = self.options.get("tools"), self.options.get("json_schema")
        return sum(map(len, texts)) + sum(len(str(each)) for each in schemas if each) > LONG_PROMPT


class Worker:
    """Loads the engine by `load`, then decodes at most `width` sequences at a time until it is stopped.

    kept: bytes of finished texts' rows that later prompts may share, where no memory plan leaves less. folder: where
    rows are put that this doesn't hold, and all of them at the end.
    """

    def __init__(
        self, load: Callable[[], Engine], width: int = WIDTH, kept: int = 0, folder: Path | None = None
    ) -> None:
        self.width = width
        self.kept = kept
        self.folder = folder
        self.loaded: Future[Engine] = Future()
        self._load = load
        self._sessions: dict[Order, Session] = {}
        self._orders: dict[Session, Order] = {}
        self._unread: set[Order] = set()  # whoever removes an order from it has it: it is opened, ended or dropped once
        self._short, self._long = Lane[Order](), Lane[Order]()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._going = True
        self._thread = Thread(target=self._run, name="longspec engine", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """The number of open sequences."""
        return len(self._orders)

    def write(self, order: Order) -> None:
        self._unread.add(order)
        self._lane(order).put(order)

    def end(self, order: Order) -> None:
        """End a sequence with its answer so far."""
        self._inbox.put(partial(self._end, order))

    def drop(self, order: Order) -> None:
        """Abandon a sequence, without further events."""
        if self._was_unread(order):
            self._lane(order).discard(order)
        else:
            self._inbox.put(partial(self._forget, order))

    def ask(self, call: Callable[[Engine], _Told]) -> Future[_Told]:
        """The result of a call in the engine's thread, between two passes: the texts that are written wait for it."""
        future: Future[_Told] = Future()

        def run() -> None:
            try:
                future.set_result(call(self._engine))
            except Exception as error:  # noqa: BLE001  it belongs to whoever asked
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def stop(self, seconds: float | None = None) -> None:
        """End the thread after the current pass; waits at most `seconds` for it."""
        self._inbox.put(self._halt)
        self._thread.join(seconds)

    def close(self) -> None:
        """End the thread, and give back the model's memory; no text may be open."""
        self.stop()
        self.loaded.result().close()
        for lane in (self._short, self._long):
            lane.close()
        gc.collect()  # sessions and drafters know each other
        release()

    def _lane(self, order: Order) -> Lane[Order]:
        return self._long if order.is_long else self._short

    def _was_unread(self, order: Order) -> bool:
        """Whether the order was unread; it isn't any more."""
        try:
            self._unread.remove(order)
        except KeyError:
            return False
        return True

    def _run(self) -> None:
        try:
            self._engine = self._load()
            self._schedule = self._scheduled(self._engine)
        except BaseException as error:  # noqa: BLE001  a signal too: the thread that waits for the engine re-raises it
            self.loaded.set_exception(error)
            return
        for lane in (self._short, self._long):
            Thread(target=self._read, args=[lane], name="longspec reading", daemon=True).start()
        self.loaded.set_result(self._engine)
        while self._going:
            self._take()
            if self._schedule:
                self._pass()
        self._schedule.prefixes.close(SHELF_SECONDS)
        del self._schedule

    def _scheduled(self, engine: Engine) -> Schedule:
        """The engine's texts, with what is kept of those that ended."""
        if engine.plan is not None:
            self.kept = min(self.kept, engine.plan.spare // 2)
        shelf = None
        if self.folder is not None:
            words = identity(engine.model, engine.cache_name)
            shelf = Shelf(self.folder, SHELF_TIMES * self.kept, words)
        schedule = Schedule(engine, self.width, self.kept, shelf)
        if engine.watch is not None:
            engine.watch.let_go = schedule.prefixes.let_go
        return schedule

    def _read(self, lane: Lane[Order]) -> None:
        """Read prompts, one after the other, until the lane is closed."""
        while (order := lane.get()) is not None:
            try:
                read: Prepared | LongspecError = self._engine.prepare(order.prompt, **order.options)
            except Exception as error:  # noqa: BLE001  whatever a stranger's prompt brings about is told to him alone
                read = reported(error)
            self._inbox.put(partial(self._open, order, read))

    def _take(self) -> None:
        """Handle the queued orders; without an open sequence, block for the next one."""
        try:
            if not self._schedule:
                self._inbox.get()()
            while self._going:
                self._inbox.get_nowait()()
        except Empty:
            pass

    def _pass(self) -> None:
        """Run one forward pass, and report each sequence's tokens or error."""
        for session, event in self._schedule.step():
            order = self._orders[session]
            if isinstance(event, LongspecError):
                self._forget(order)
                order.tell(event)
                continue
            order.tell(event)
            if event.finish_reason is not None:
                self._close(order)
        if (reading := self._schedule.reading) is not None:
            cached = reading.cached
            done = Reading(reading.cache.length - cached, reading.prompt_length - 1 - cached)
            self._orders[reading].tell(done)

    def _open(self, order: Order, read: Prepared | LongspecError) -> None:
        if not self._was_unread(order):  # abandoned or ended meanwhile
            return
        session = read if isinstance(read, LongspecError) else self._schedule.join(read)
        if isinstance(session, LongspecError):  # an invalid prompt: report it and continue
            order.tell(session)
            return
        self._sessions[order], self._orders[session] = session, order
        order.tell(Opened(session.prompt_length))

    def _end(self, order: Order) -> None:
        session = self._sessions.get(order)
        if session is None:
            if self._was_unread(order):
                self._lane(order).discard(order)
                order.tell(UnreadError("The text was ended while its prompt was being read; ask later, or shorter."))
            return
        self._schedule.drop(session)
        order.tell(session.interrupt())
        self._close(order)

    def _close(self, order: Order) -> None:
        session = self._sessions[order]
        answer = self._engine.answer(session, order.began)
        self._forget(order)
        order.tell(Ended(answer, tuple(session.notes), message_of(session, self._engine.model.vocabulary)))

    def _forget(self, order: Order) -> None:
        session = self._sessions.pop(order, None)
        if session is not None:
            del self._orders[session]
            self._schedule.drop(session)

    def _halt(self) -> None:
        self._going = False
