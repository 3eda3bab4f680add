"""The cluster: whether Ray is here and answers, and how many engines it has places for.

Takes what `--on` says; knows no batch.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from longspec.errors import UsageError

__all__ = ["Places", "connected", "nodes", "places", "where"]

_CONNECT_SECONDS = 10.0

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
"""How HTTP/2, and so gRPC, begins: a server answers with settings (RFC 9113, section 3.4)."""


@dataclass(frozen=True, slots=True)
class Places:
    """Engines at a time, and what each takes of its node."""

    actors: int
    cpus: int
    gpus: int = 0

    def __str__(self) -> str:
        share = f"{self.gpus:.0f} GPU" if self.gpus else f"{self.cpus} CPU{'s' * (self.cpus > 1)}"
        return f"{self.actors} engine{'s' * (self.actors > 1)} of {share}{' each' * (self.actors > 1)}"

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `Engine.load`."""
        return {"threads": self.cpus, "device": "cuda" if self.gpus else "cpu"}

    @property
    def needs(self) -> dict[str, float]:
        """The keywords of `map_batches`."""
        return {"num_cpus": self.cpus, **({"num_gpus": self.gpus} if self.gpus else {})}


def where(on: str) -> str | None:
    """The address in `ray` or `ray:ADDRESS`; None of a Ray of this machine alone.

    Raises:
        UsageError: it is neither, or Ray isn't installed.
    """
    kind, _, address = on.partition(":")
    if kind != "ray" or (not address and on != "ray"):
        raise UsageError(f"--on {on} is not known; use ray, or ray:HOST:PORT of a cluster's head.")
    if address.startswith("ray://"):
        raise UsageError(
            "--on takes the address of a cluster's head (ray:HOST:6379), not of its client server; start the command "
            "on a node of the cluster, or by ray job submit."
        )
    if find_spec("ray") is None:
        raise UsageError("--on ray needs Ray, which isn't installed; install it by pip install 'longspec[ray]'.")
    return address or None


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Within the block this process is a driver of the cluster, or of a Ray that is started here.

    Raises:
        UsageError: nothing answers at the address within ten seconds.
    """
    if address not in (None, "auto"):
        _knock(address)
    # Of a library that a command uses: no statistics are sent unless the user's own settings say so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what it warns of otherwise
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    started = not ray.is_initialized()
    if started:
        _init(ray, address)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _init(ray: Any, address: str | None) -> None:
    here: dict[str, Any] = {"address": address or "local"}
    if address is None:
        here["include_dashboard"] = False
    handler, debugger = signal.getsignal(signal.SIGTERM), os.environ.get("PYTHONBREAKPOINT")
    try:
        with _quiet_stderr():
            ray.init(log_to_driver=False, logging_level="ERROR", **here)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        said = " ".join(str(error).split())[:300].rstrip(".")
        place = "Ray can't be started here" if address is None else f"No Ray cluster answers at {address}"
        raise UsageError(f"{place}: {said}; see whether ray status knows it.") from error
    finally:  # what Ray has put its own in place of
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        os.environ.pop("PYTHONBREAKPOINT", None)
        if debugger is not None:
            os.environ["PYTHONBREAKPOINT"] = debugger


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Without what Ray's C++ says of its own settings as it starts; what goes wrong is raised."""
    try:
        kept = os.dup(2)
    except OSError:  # the process has no stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _knock(address: str) -> None:
    """Raise UsageError where no gRPC server answers: `ray.init` would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"{address!r} is no address of a Ray cluster; give HOST:PORT of its head, such as head:6379.")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS) as connection:
            connection.sendall(_HELLO)
            if connection.recv(9)[3:4] != b"\x04":
                raise OSError("what listens there is something else")
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"No Ray cluster answers at {address} ({error or type(error).__name__}); start one there by ray start "
            "--head, or name another address."
        ) from None


def nodes() -> list[dict[str, float]]:
    """The resources of each node of the cluster, as Ray names them."""
    import ray

    alive: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in alive if node["Alive"]]


def places(
    nodes: Sequence[Mapping[str, float]], *, device: str, threads: int | None, actors: int | None = None
) -> Places:
    """How many engines fit. nodes: each one's resources, as Ray names them. threads: CPUs of an engine; all of the
    smallest node, if left out. On GPUs an engine takes one, and a share of the node's CPUs. actors: at most so many.

    Raises:
        UsageError: no node has what an engine takes.
    """
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if device.startswith("cuda") or (device == "auto" and any(gpus)):
        found, share = sum(gpus), threads or 1
        place = Places(min(found, actors or found), share, 1)
    else:
        share = threads or min((count for count in cpus if count), default=1)
        found = sum(count // share for count in cpus)
        place = Places(min(found, actors or found), share)
    if not found:
        raise UsageError(
            f"No node of the Ray cluster has {'a GPU' if place.gpus else f'{share} CPUs'} for an engine; it has "
            f"{sum(cpus)} CPUs and {sum(gpus)} GPUs on {len(nodes)} nodes."
        )
    return place
