"""One client's connection: uvicorn's HTTP/1.1, with limits on what may be kept waiting.

uvicorn waits for ever for a request's head, and for the rest of a body that was answered early. Here both have a
deadline, and where too many connections are open, the one that has waited longest for a head gives way: slow ones lock
nobody out.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_NBYTES", "HEAD_SECONDS", "MOST_CONNECTIONS", "Connection"]

HEAD_SECONDS = 10.0
"""In which a request's head has to arrive, from the connection's or the head's first byte on."""

HEAD_NBYTES = 32 << 10
"""Of a request's head; browsers and proxies send at most 16 KiB."""

MOST_CONNECTIONS = 512
"""Half of the files that a process may usually have open."""


class Connection(H11Protocol):
    """A connection whose deadline runs while it waits for what no application waits for."""

    _deadline: asyncio.TimerHandle | None = None
    _since = 0.0  # on the loop's clock: when it began to wait for a head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > MOST_CONNECTIONS:
            self._make_room()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._disarm()

    @property
    def _waits(self) -> bool:
        """For a head, or for the rest of a body that was answered. Between two requests uvicorn's own timer runs."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self._waits:
            self._disarm()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _make_room(self) -> None:
        waiting = [each for each in self.connections if isinstance(each, Connection) and each._waits]
        first = min(waiting, key=lambda each: each._since, default=self)
        self.connections.discard(first)  # at once: several may come before the loop tells it
        first.transport.abort()
