"""The listeners: an address, and a Unix socket that only this user can open, until a signal arrives.

Takes applications and sockets; uvicorn does the HTTP. The first signal gives running answers a grace period of some
seconds, the second ends them at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from longspec.errors import UsageError
from longspec.server.connection import HEAD_NBYTES, Connection
from longspec.server.desk import Desk

__all__ = ["LAST_SECONDS", "Listener", "bind", "bound_unix", "listen"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST_SECONDS = 3.0
"""After the answers were told to end: a pass may be running, and a slow reader has to get the rest."""


class _Server(uvicorn.Server):
    """A uvicorn server without signal handlers: they are set once for all servers of the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Listener:
    """Applications at their sockets. `stop` ends them after their running answers, at most `grace` seconds later."""

    def __init__(self, desk: Desk, doors: Sequence[tuple[ASGIApp, socket.socket]], grace: float) -> None:
        self._desk = desk
        self._grace = grace
        self._servers = [(_Server(_config(app, grace)), door) for app, door in doors]

    async def run(self) -> None:
        await asyncio.gather(*(server.serve([door]) for server, door in self._servers))

    def stop(self) -> None:
        """Stop listening; a second call ends the answers at once, with their text so far."""
        if self._desk.closing:
            self._desk.end()
        else:
            self._desk.close(self._grace)
        for server, _ in self._servers:
            server.should_exit = True


async def listen(
    desk: Desk, doors: Sequence[tuple[ASGIApp, socket.socket]], grace: float, ready: Callable[[], None]
) -> None:
    """Serve until a signal arrives. ready: called once the signal handlers are set."""
    listener, loop = Listener(desk, doors, grace), asyncio.get_running_loop()
    for signum in _SIGNALS:
        loop.add_signal_handler(signum, listener.stop)
    ready()
    await listener.run()


def _config(app: ASGIApp, grace: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        h11_max_incomplete_event_size=HEAD_NBYTES,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=100,  # above CRITICAL: the application reports errors itself
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(grace + LAST_SECONDS),
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket's address, bound. Raises UsageError: the address can't be used."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise UsageError(
            f"{host}:{port} can't be listened on: {error.strerror}; give another --port, or --host."
        ) from error
    return listener


@contextmanager
def bound_unix(path: Path) -> Iterator[socket.socket | None]:
    """A socket at this path while the block runs; None where another server listens there.

    The path appears only once the socket listens, so that a client that finds it can connect; the folder is the
    user's own.
    """
    if _answers(path):
        yield None
        return
    listener, beside = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path.with_name(f".{os.getpid()}")
    beside.unlink(missing_ok=True)
    listener.bind(str(beside))
    beside.chmod(stat.S_IRUSR | stat.S_IWUSR)
    listener.listen()
    mine = beside.stat().st_ino
    beside.rename(path)
    try:
        yield listener
    finally:
        with suppress(OSError):
            if path.stat().st_ino == mine:  # not yet replaced by another server's
                path.unlink()


def _answers(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect(str(path))
        return True
    return False
