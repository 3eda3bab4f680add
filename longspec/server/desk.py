"""The dispatcher between the event loop and the workers' threads: requests go in, their events come back.

Limits the number of open sequences and their time, and drops requests whose client has disconnected. Knows no JSON.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from longspec.engine.answer import Answer
from longspec.engine.options import Options
from longspec.server.refusals import BUSY, RefusedError
from longspec.server.worker import Ended, Event, Opened, Order, Reading, Worker
from longspec.text.prompt import Prompt
from longspec.types import Commit

__all__ = ["Desk", "GoneError", "Texts"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class GoneError(Exception):
    """The client has disconnected."""


class Desk:
    """Takes requests while fewer than `most` sequences are open, each for at most `seconds`."""

    def __init__(self, most: int, seconds: float) -> None:
        self.most = most
        self.seconds = seconds
        self.closing = False
        self._open: set[Texts] = set()

    def __len__(self) -> int:
        """The number of open sequences."""
        return sum(len(texts) for texts in self._open)

    def writes(self, worker: Worker) -> bool:
        """Whether sequences of this worker are open."""
        return any(texts.worker is worker for texts in self._open)

    def take(
        self,
        worker: Worker,
        texts: Sequence[tuple[Prompt, Options]],
        receive: Receive,
        *,
        began: float | None = None,
        ended: Callable[[Answer], None] | None = None,
        local: bool = False,
    ) -> Texts:
        """Submit the sequences of one request to a worker. receive: the ASGI channel that, once the body is read,
        signals a disconnect. ended: told each answer.

        local: from `longspec run` on this machine: no time limit, since its user can interrupt it.

        Raises RefusedError: the server is full, or closes.
        """
        if self.closing:
            raise RefusedError(503, "This server is closing; ask another, or later.", code="closing")
        if len(self) + len(texts) > self.most:
            sentence = f"{len(self)} texts are being written or wait, of {self.most} that may; try again later."
            raise RefusedError(429, sentence, **BUSY)
        taken = Texts(self, worker, texts, receive, began, ended, None if local else self.seconds)
        self._open.add(taken)
        return taken

    def leave(self, texts: Texts) -> None:
        self._open.discard(texts)

    def close(self, seconds: float) -> None:
        """Accept no more requests; after `seconds`, end the open sequences with their answers so far."""
        self.closing = True
        asyncio.get_running_loop().call_later(seconds, self.end)

    def end(self) -> None:
        """End all open sequences, with their answers so far."""
        for texts in list(self._open):
            texts.end()


class Texts:
    """The sequences of one request; closed when all events are delivered or the client has disconnected."""

    def __init__(
        self,
        desk: Desk,
        worker: Worker,
        texts: Sequence[tuple[Prompt, Options]],
        receive: Receive,
        began: float | None,
        ended: Callable[[Answer], None] | None,
        seconds: float | None,
    ) -> None:
        self._desk, self.worker = desk, worker
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._early = deque[tuple[int, Event]]()  # taken from there, and not told yet
        loop = asyncio.get_running_loop()
        tell = [partial(_bring, loop, self._events, place) for place in range(len(texts))]
        self._orders = [Order(*text, told, began) for text, told in zip(texts, tell, strict=True)]
        self._going = len(texts)
        self._ended = ended
        for order in self._orders:
            worker.write(order)
        self._limit = None if seconds is None else loop.call_later(seconds, self.end)
        self._watcher = asyncio.create_task(self._watch(receive))

    def __len__(self) -> int:
        return self._going

    async def opened(self) -> list[int]:
        """Wait until every prompt is opened; gives their tokens. Raises the error of one that is invalid."""
        tokens: dict[int, int] = {}
        while len(tokens) < len(self._orders):
            place, event = await self._next()
            if isinstance(event, Opened):
                tokens[place] = event.prompt_tokens
            else:  # one sequence may start while another's prompt is still being opened
                self._early.append((place, event))
        return [tokens[place] for place in range(len(tokens))]

    async def told(self) -> AsyncIterator[tuple[int, Reading | Commit | Ended]]:
        """Yield each sequence's index and events, until all have ended."""
        try:
            while self._going:
                place, event = self._early.popleft() if self._early else await self._next()
                if isinstance(event, Ended):
                    self._going -= 1
                    if self._ended is not None:
                        self._ended(event.answer)
                if isinstance(event, Ended | Commit | Reading):
                    yield place, event
        finally:
            self.close()

    def end(self) -> None:
        """End the sequences, with their answers so far."""
        for order in self._orders:
            self.worker.end(order)

    def close(self) -> None:
        """Drop the unfinished sequences."""
        for order in self._orders:
            self.worker.drop(order)
        self._going = 0
        self._desk.leave(self)
        self._watcher.cancel()
        if self._limit is not None:
            self._limit.cancel()

    async def _next(self) -> tuple[int, Event]:
        place, event = await self._events.get()
        if isinstance(event, Exception):
            self.close()
            raise event
        return place, event

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        _bring(asyncio.get_running_loop(), self._events, 0, GoneError())
        self.close()


def _bring(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], place: int, event: Event) -> None:
    """Deliver an event from any thread to the loop. A closed loop has no reader left."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(events.put_nowait, (place, event))
