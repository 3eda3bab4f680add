"""One engine of a cluster's batch, as Ray Data runs it: groups of records in, lines of the output out.

Knows no Ray. What goes in and out is bytes in a column, so that Ray moves a group as one value.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from longspec import __version__
from longspec.batch.records import Outcome, outcome
from longspec.errors import LongspecError, reported

if TYPE_CHECKING:
    from longspec.batch.requests import Fault, Item
    from longspec.engine.options import Options

__all__ = ["Actor", "Order", "Report"]


@dataclass(frozen=True, slots=True)
class Order:
    """What every actor of a batch is made for. folder: the driver's, where this machine has it too, so that relative
    names mean the same.
    """

    version: str
    model: str
    loading: Mapping[str, Any]  # keywords of `Engine.load`
    writing: Options
    width: int | None
    openai: bool
    folder: str


@dataclass(frozen=True, slots=True)
class Report:
    """What an actor sends back: a group's outcomes, or the error for which it can't write any."""

    actor: str  # host:process
    identity: Mapping[str, str] = field(default_factory=dict)
    drafter: str = "none"
    outcomes: Sequence[Outcome] = ()
    seconds: float = 0.0  # since the actor's first call
    error: LongspecError | None = None


class Actor:
    """Loads the model once; then each call writes a group beside those of the calls that run at the same time."""

    def __init__(self, order: Order) -> None:
        from longspec.batch.about import identity
        from longspec.engine.engine import Engine
        from longspec.ray.shared import Shared

        self._name, self._order = f"{socket.gethostname()}:{os.getpid()}", order
        self._error: LongspecError | None = None
        try:
            _check_version(order.version)
            with suppress(OSError):
                os.chdir(order.folder)
            engine = Engine.load(order.model, **order.loading)
        except Exception as error:  # noqa: BLE001  the driver says it: Ray would start the actor again and again
            self._error = error if isinstance(error, LongspecError) else reported(error)
            return
        self._identity, self._drafter = identity(engine), engine.drafter_name
        self._shared = Shared(engine, order.writing, order.width)
        self._began: float | None = None

    def __call__(self, batch: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        return {"report": [pickle.dumps(self._write(pickle.loads(group))) for group in batch["group"]]}  # noqa: S301  the driver's own

    def _write(self, records: Sequence[Item | Fault]) -> Report:
        if self._error is not None:
            return Report(self._name, error=self._error)
        if self._began is None:
            self._began = perf_counter()
        outcomes = [outcome(result, openai=self._order.openai) for result in self._shared.write(records)]
        return Report(self._name, self._identity, self._drafter, outcomes, perf_counter() - self._began)


def _check_version(driver: str) -> None:
    if driver != __version__:
        raise LongspecError(
            f"{socket.gethostname()} has longspec {__version__}, and the driver {driver}; install the same version on "
            "every node."
        )
