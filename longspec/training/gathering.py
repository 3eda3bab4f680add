"""The workers of a training, as one process sees them: the store through which they speak, and who forms an epoch.

Workers of this machine are started as children; others join by the address. One that has died, or gives no sign of
life, is left out of the next epoch. This process decides alone, so nobody has to agree on who is there; it trains
nothing and holds no weights.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep

from longspec.errors import LongspecError, UsageError
from longspec.training.together import CHILD, dist

__all__ = ["FROZEN", "Gathering"]

FROZEN = 15.0
"""Seconds without a sign of life after which a worker is given up; it gives two a second."""

_LOOK, _ENDING = 0.05, 10.0  # seconds


@dataclass(slots=True)
class Worker:
    """As it was last seen."""

    child: str  # its number among the children, as it says; empty where it was started elsewhere
    beat: bytes
    since: float  # of this beat
    ready: bool = False  # to train: it has features and a head


class Gathering:
    def __init__(self, host: str = "127.0.0.1", port: int = 0, frozen: float = FROZEN) -> None:
        """host, port: where to listen; port 0 is any free one.

        Raises:
            UsageError: there is no such address, or it is in use.
        """
        try:
            listener = socket.create_server((host, port))
        except OSError as error:
            raise UsageError(f"Workers can't be gathered at {host}:{port} ({error.strerror or error}); name an address "
                             "of this machine, and a free port.") from error  # fmt: skip
        self.host, self.port = host, int(listener.getsockname()[1])
        self.children: list[subprocess.Popen[bytes]] = []
        self.members: list[int] = []  # in the order in which they became so
        self.epoch, self._frozen, self._asked = -1, frozen, False
        self._said: list[object] = []
        self.workers: dict[int, Worker] = {}
        self._lost: set[int] = set()
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30),
            master_listen_fd=listener.detach(),
        )  # fmt: skip

    def start(self, command: Sequence[str]) -> None:
        """Start a worker on this machine."""
        setting = {**os.environ, CHILD: str(len(self.children))}
        self.children.append(subprocess.Popen(command, env=setting))  # noqa: S603 - this command itself

    def run(self, command: Sequence[str], count: int, quiet: Sequence[str]) -> int:
        """Start workers, and wait until they have ended. The others are started when the first one has come, so that
        what is wrong with the command is said once. quiet: arguments for those. Returns the exit code.

        Raises:
            LongspecError: all have died.
        """
        try:
            self.start(command)
            while self.running or len(self.children) < count:
                self.look()
                if self.workers and len(self.children) < count:
                    self.start([*command, *quiet])
                elif not self.running:
                    break
                sleep(_LOOK)
        finally:
            for child in self.children:
                child.terminate()
            for child in self.children:
                try:
                    child.wait(_ENDING)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        codes = [child.returncode for child in self.children]
        if 0 not in codes and max(codes) < 0:
            raise LongspecError("All workers have died before the training ended; the same command goes on from the "
                                "checkpoint.")  # fmt: skip
        return 0 if 0 in codes else max(codes)

    @property
    def running(self) -> bool:
        return any(child.poll() is None for child in self.children)

    def look(self) -> None:
        """See who is there, and say so where it has changed."""
        gone = {str(number) for number, child in enumerate(self.children) if child.poll() is not None}
        for number in range(self._store.add("workers", 0)):
            if number not in self._lost and self._store.check([f"worker/{number}"]):
                self._see(number, gone)
        alive = sorted(self.workers)
        stay = [number for number in self.members if number in self.workers]
        members = [*stay, *(n for n in alive if n not in stay and self.workers[n].ready)]
        broken = self.epoch >= 0 and self._store.check([f"broken/{self.epoch}"])
        asked, self._asked = self._asked, broken  # at the second look, so that who has died is known to have
        if members != self.members or (broken and asked):
            self.epoch, self.members, self._asked = self.epoch + 1, members, False
        if self._said != (said := [self.epoch, alive, self.members]):
            self._said = said
            self._store.set("epoch", json.dumps(said))

    def _see(self, number: int, gone: set[str]) -> None:
        beat, now = self._store.get(f"beat/{number}"), monotonic()
        if number not in self.workers:
            self.workers[number] = Worker(self._store.get(f"worker/{number}").decode(), beat, now)
        worker = self.workers[number]
        if worker.beat != beat:
            worker.beat, worker.since = beat, now
        worker.ready = worker.ready or self._store.check([f"ready/{number}"])
        if worker.child in gone or now - worker.since > self._frozen:
            self._lost.add(number)
            del self.workers[number]
            if worker.child:  # one that woke up would write over others' files
                self.children[int(worker.child)].kill()
