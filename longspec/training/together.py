"""What a training asks of its company: to sum a step's gradients, and to do once what is to be done once.

A step is B numbered micro-batches however many workers there are (ReCoVer, 2605.11215), and their gradients are added
in the order of their numbers. So who computed which changes no bit. `Together` is one process alone, `Company` one of
several workers, each of which has all weights and sees the same folder. What they say to each other goes through the
store of the command that started them (`longspec.training.gathering`); gradients go from worker to worker, over gloo.
When a worker dies or joins, those who are there form a new group, and keep what they have computed:

    look      who forms the newest epoch
    agree     each says which numbers it holds; who is new takes the state of one that isn't, through the checkpoint
    sum       numbers that nobody holds are dealt among all and computed; number by number, all are told and add
    commit    where all have the whole sum; all decide alike
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import cycle
from threading import Thread
from time import monotonic, sleep
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from longspec.errors import LongspecError, UsageError
from longspec.training.lanes import Lanes

__all__ = ["CHILD", "Behind", "Company", "Together", "dist", "together"]

T = TypeVar("T")
dist: Any = distributed  # whose stubs lack half of what is used here

CHILD = "LONGSPEC_WORKER"
"""The environment variable that tells a worker its number among the children of the command that started it."""

BEAT = 0.5
"""Seconds between two signs of life."""

PATIENCE = 1800.0
"""Seconds without a step or a report after which a worker gives no more signs of life: it hangs."""

_FORMING = timedelta(seconds=20)  # to connect workers that are all there
_ANSWERING = 10.0  # seconds
_POLL, _LONGEST_POLL = 5e-4, 0.02  # seconds


class Behind(Exception):  # noqa: N818 - no error
    """Raised in a worker that is new: it is to load the checkpoint, which one of the others has just written; or where
    all are new the newest that those before them have left.
    """


class Broken(Exception):  # noqa: N818 - no error, but a worker's that has gone
    """The group is of no more use: a worker has gone, or another epoch has begun."""


class Together:
    """One process alone."""

    first = True
    """True in the process that leads: it validates, writes and reports."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes

    def moves(self) -> None:
        """Say that the training goes on."""

    def lead(self, name: str, act: Callable[[], T]) -> T:
        """What `act` returns in the process that leads, in all of them; another one acts where that one dies before it
        could say so. name: unique in a training. The value must be what JSON can hold.
        """
        return act()

    def sum(
        self, step: int, count: int, gradient: Callable[[int], Tensor], size: int, save: Callable[[], None]
    ) -> Tensor:
        """[size]: the gradients of micro-batches 0 to count - 1, added in this order. save: writes the checkpoint, as
        it is before this step.

        Raises:
            Behind: before anything was computed for this step.
        """
        total: Tensor | None = None
        for made in self.lanes.map(gradient, range(count)):
            total = made if total is None else total.add_(made)
        assert total is not None
        return total


class Company(Together):
    """A worker among others."""

    def __init__(self, host: str, port: int, lanes: Lanes) -> None:
        super().__init__(lanes)
        try:
            socket.create_connection((host, port), _ANSWERING).close()  # the store would try for its whole timeout
            self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"No training answers at {host}:{port}; `longspec train --workers` says where "
                             "it is to be joined.") from error  # fmt: skip
        self._host = _own_address(host, port)
        self.number = self._ask("add", "workers", 1) - 1
        self._alive: list[int] = []
        self._members: list[int] = []
        self._epoch = self._agreed = self._formed = -1
        self._met = False  # has the state that the others have
        self._step, self._holders = -1, dict[int, int]()  # where the epoch began: a step, and who held which number
        self._group: Any = None
        self._moved = monotonic()
        self._ask("set", f"beat/{self.number}", "0")
        self._ask("set", f"worker/{self.number}", os.environ.get(CHILD, ""))
        Thread(target=self._beat, args=[self._store.clone()], daemon=True).start()

    @property
    def first(self) -> bool:  # type: ignore[override]
        """The longest member leads, and before there are any the first worker."""
        return [*self._members, *self._alive][:1] == [self.number]

    def moves(self) -> None:
        self._moved = monotonic()

    def lead(self, name: str, act: Callable[[], T]) -> T:
        while not self._ask("check", [f"done/{name}"]):
            self._look()
            if self.first and not self._ask("check", [f"done/{name}"]):  # not by one that has left since
                value = act()
                self._ask("set", f"done/{name}", json.dumps(value))
                return value
            sleep(_LONGEST_POLL)
        found: T = json.loads(self._ask("get", f"done/{name}"))
        return found

    def sum(
        self, step: int, count: int, gradient: Callable[[int], Tensor], size: int, save: Callable[[], None]
    ) -> Tensor:
        held: dict[int, Tensor] = {}
        while True:
            try:
                owners = self._meet(step, held, save, count)
                own = self._members.index(self.number)
                lacking = [number for number, owner in enumerate(owners) if owner == own and number not in held]
                for number, made in zip(lacking, self.lanes.map(gradient, lacking), strict=True):
                    held[number] = made.cpu()
                    self.moves()
                for number, owner in enumerate(owners):
                    held[number] = self._told(held[number] if owner == own else torch.empty(size), owner)
                self._commit(step)
            except Broken:
                continue
            total = held[0].clone()
            for number in range(1, count):
                total += held[number]
            return total

    def _meet(self, step: int, held: dict[int, Tensor], save: Callable[[], None], count: int) -> list[int]:
        """Be in a group with all members of the newest epoch; returns who is to give each number, by their ranks."""
        if not self._met:
            self._ask("set", f"ready/{self.number}", "")
        self._look()
        while self.number not in self._members:
            sleep(_LONGEST_POLL)
            self._look()
        if self._agreed != self._epoch:
            self._agree(step, held, save)
        if self._formed != self._epoch:
            self._form()
        holders, dealt = (self._holders if step == self._step else {}), cycle(range(len(self._members)))
        return [holders[number] if number in holders else next(dealt) for number in range(count)]

    def _agree(self, step: int, held: dict[int, Tensor], save: Callable[[], None]) -> None:
        """Learn who holds what, and give the state to those who are new. All others are at the same step. Where there
        are none, those who are new may have loaded checkpoints of different steps, and the others left a newer one.
        """
        epoch, members = self._epoch, self._members
        self._ask("set", f"{epoch}/at/{self.number}", json.dumps([self._met, step, sorted(held)]))
        places = [f"{epoch}/at/{number}" for number in members]
        self._wait(places)
        said = [json.loads(self._ask("get", place)) for place in places]
        source = next((rank for rank, (met, _, _) in enumerate(said) if met), None)
        new = [rank for rank, (met, _, _) in enumerate(said) if not met]
        own = members.index(self.number)
        if new and own == source:
            save()
            self._ask("set", f"{epoch}/saved", "")
        if own in new and source is not None:
            self._wait([f"{epoch}/saved"])
        self._step, self._met, self._agreed = said[source or 0][1], True, epoch
        self._holders = {number: rank for rank in reversed(range(len(said))) for number in said[rank][2]}
        if own in new:
            raise Behind

    def _form(self) -> None:
        """Connect to the other members, when all are there to do so."""
        epoch, members = self._epoch, self._members
        self._leave()
        self._ask("set", f"{epoch}/here/{self.number}", "")
        self._wait([f"{epoch}/here/{number}" for number in members])
        if len(members) > 1:
            made: list[Any] = []
            thread = Thread(target=self._connect, args=[epoch, members.index(self.number), len(members), made])
            thread.daemon = True  # it is left alone where one of the others dies meanwhile
            thread.start()
            while not made:
                sleep(_POLL)
                if self._look():
                    raise Broken
            if isinstance(made[0], RuntimeError):
                self._broken(made[0])
            self._group = made[0]
        self._formed = epoch

    def _connect(self, epoch: int, rank: int, size: int, made: list[Any]) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = _FORMING
        try:  # a client of its own, as one waits for one thing at a time
            store = dist.PrefixStore(f"{epoch}/group", self._store.clone())
            made.append(dist.ProcessGroupGloo(store, rank, size, options))
        except RuntimeError as error:
            made.append(error)

    def _leave(self) -> None:
        """Drop the group. Its destructor waits for what is under way, perhaps for a worker that isn't there."""
        held = [self._group]
        self._group = None
        Thread(target=held.clear, daemon=True).start()

    def _told(self, gradient: Tensor, owner: int) -> Tensor:
        """Give a gradient to all members, or take it."""
        if self._group is None:
            return gradient
        options, poll = dist.BroadcastOptions(), _POLL
        options.rootRank, options.rootTensor, options.timeout = owner, 0, timedelta(seconds=PATIENCE)
        try:
            work = self._group.broadcast([gradient], options)
            while not work.is_completed():
                sleep(poll)
                poll = min(2 * poll, _LONGEST_POLL)
                if self._look():
                    raise Broken
            work.wait()
        except RuntimeError as error:
            self._broken(error)
        return gradient

    def _commit(self, step: int) -> None:
        """Go on to the next step if all members have the whole sum. The first word in the store decides for all."""
        place, word = f"{self._epoch}/{step}", "yes"
        self._ask("add", f"{place}/whole", 1)
        while self._ask("add", f"{place}/whole", 0) < len(self._members):
            if self._look():
                word = "no"
                break
            sleep(_POLL)
        if self._ask("compare_set", place, "", word) != b"yes":
            raise Broken
        if word == "yes":  # so all are here, and have read what was decided before
            for key in (f"{self._epoch}/{step - 1}", f"{self._epoch}/{step - 1}/whole"):
                self._ask("delete_key", key)

    def _broken(self, error: Exception) -> None:
        """Ask for a new epoch, and wait for it."""
        self._ask("set", f"broken/{self._epoch}", "")
        while not self._look():
            sleep(_LONGEST_POLL)
        raise Broken from error

    def _look(self) -> bool:
        """See who is there; True if a newer epoch has begun."""
        self.moves()
        before = self._epoch
        if self._ask("check", ["epoch"]):
            self._epoch, self._alive, self._members = json.loads(self._ask("get", "epoch"))
            if self._met and self.number not in self._members:
                raise LongspecError("The others go on without this worker, which gave no sign of life; "
                                    "start another one.")  # fmt: skip
        return self._epoch != before

    def _wait(self, keys: list[str]) -> None:
        while not self._ask("check", keys):
            if self._look():
                raise Broken
            sleep(_LONGEST_POLL)

    def _ask(self, verb: str, *values: Any) -> Any:
        try:
            return getattr(self._store, verb)(*values)
        except RuntimeError as error:
            raise LongspecError("The command that started the workers has ended; the same command goes on from the "
                                "checkpoint.") from error  # fmt: skip

    def _beat(self, store: Any) -> None:
        count = 0
        with suppress(RuntimeError):  # the main thread will say so
            while True:
                if monotonic() - self._moved < PATIENCE:
                    count += 1
                    store.set(f"beat/{self.number}", str(count))
                sleep(BEAT)


def together(address: tuple[str, int] | None, lanes: Lanes) -> Together:
    """A worker of the training that is gathered at this address, or this process alone.

    Raises:
        UsageError: nothing answers there.
    """
    return Together(lanes) if address is None else Company(*address, lanes)


def _own_address(host: str, port: int) -> str:
    """The address of this machine that a machine can be reached from by which it reaches the other one."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return str(probe.getsockname()[0])
