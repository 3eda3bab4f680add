"""The models of one server: loaded when a request names one, unloaded when nobody has for a while, under one budget.

Takes names and what loads them; gives workers. A name is only compared with those that the operator gave: what a
stranger sends is never a path.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

from longspec.engine.engine import Engine
from longspec.errors import BudgetError
from longspec.machine.system import resident_bytes
from longspec.server.desk import Desk
from longspec.server.refusals import BUSY, RefusedError
from longspec.server.worker import Worker

__all__ = ["Models", "Start"]

Start = Callable[[int | None], Worker]
"""Begins to load a model: within so many bytes for the process, or within what the operator said (None)."""

_LOOKS = 4
"""Times that is looked for unused models, in the time after which they go."""


@dataclass(slots=True, eq=False)
class _Model:
    name: str
    start: Start
    worker: Worker | None = None
    asked: int = 0  # requests that have it and write nothing yet
    used: float = 0.0  # when a request last had it, on the monotonic clock
    coming: int = 0  # bytes that its plan has beyond what it took when it was loaded


class Models:
    """idle: seconds after which a model that nobody uses is unloaded; None: it stays."""

    def __init__(self, desk: Desk, starts: Mapping[str, Start], idle: float | None = None) -> None:
        self._models = {name: _Model(name, start) for name, start in starts.items()}
        self._desk, self._idle = desk, idle
        self._budget: int | None = None
        self._loading = asyncio.Lock()
        self._is_looking = False

    @property
    def names(self) -> list[str]:
        """The first one is for requests that name none."""
        return [*self._models]

    def __len__(self) -> int:
        """The number of texts whose prompts have been read."""
        return sum(len(each.worker) for each in self._models.values() if each.worker is not None)

    def begin(self) -> Engine:
        """Load the first model; blocks until it is there."""
        first = next(iter(self._models.values()))
        worker = first.start(None)
        worker.loaded.result()
        return self._loaded(first, worker)

    @asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Worker]:
        """A model's worker, which isn't unloaded within the block, and while texts of its are open.

        Raises:
            RefusedError: there is no such model, or no memory for it now.
            LongspecError: it can't be loaded.
        """
        model = self._models.get(self.names[0] if name is None else name)
        if model is None:
            raise self.none(str(name))
        model.asked += 1
        try:
            while model.worker is None:
                await asyncio.shield(asyncio.create_task(self._load(model)))
            yield model.worker
        finally:
            model.asked -= 1
            model.used = monotonic()
            self._look_again()

    def none(self, name: str) -> RefusedError:
        """What is said of a model that isn't here."""
        here = ", ".join(map(repr, self.names))
        return RefusedError(404, f"There is no model {name!r} here; this server has {here}.", code="model_not_found")

    def stop(self, seconds: float) -> None:
        """End all threads, each after its current pass; waits at most `seconds` for them together."""
        end, workers = monotonic() + seconds, [each.worker for each in self._models.values() if each.worker is not None]
        for worker in workers:
            worker.stop(0)
        for worker in workers:
            worker.stop(max(0, end - monotonic()))

    async def _load(self, model: _Model) -> None:
        async with self._loading:
            while model.worker is None:
                loaded = [each for each in self._models.values() if each.worker is not None]
                room = None if self._budget is None else self._budget - sum(each.coming for each in loaded)
                worker = model.start(room if room is None else max(1, room))
                try:
                    await _ended(worker.loaded)
                except BudgetError:
                    last = min(filter(self._is_unused, loaded), key=lambda each: each.used, default=None)
                    if last is not None:
                        await self._unload(last)
                    elif loaded:
                        busy = ", ".join(each.name for each in loaded)
                        said = f"There is no memory for {model.name} beside {busy}, in use now; try again later."
                        raise RefusedError(503, said, **BUSY) from None
                    else:
                        raise
                else:
                    self._loaded(model, worker)

    def _loaded(self, model: _Model, worker: Worker) -> Engine:
        engine = worker.loaded.result()
        model.worker, model.used = worker, monotonic()
        if engine.plan is not None:
            self._budget = self._budget or engine.plan.budget
            model.coming = max(0, engine.plan.choice.need.total + worker.kept - resident_bytes())
        return engine

    def _is_unused(self, model: _Model) -> bool:
        return model.worker is not None and not model.asked and not self._desk.writes(model.worker)

    async def _unload(self, model: _Model) -> None:
        worker, model.worker, model.coming = model.worker, None, 0
        if worker is not None:
            await asyncio.get_running_loop().run_in_executor(None, worker.close)

    def _look_again(self) -> None:
        """Look for unused models in a while, as long as there is one."""
        if self._idle is not None and not self._is_looking:
            self._is_looking = True
            asyncio.get_running_loop().call_later(
                self._idle / _LOOKS, lambda: asyncio.ensure_future(self._unload_unused())
            )

    async def _unload_unused(self) -> None:
        self._is_looking = False
        async with self._loading:
            for model in self._models.values():
                if self._desk.closing:
                    return
                if model.worker is not None and self._desk.writes(model.worker):
                    model.used = monotonic()
                if self._is_unused(model) and monotonic() - model.used >= (self._idle or 0):
                    await self._unload(model)
        if any(model.worker is not None for model in self._models.values()):
            self._look_again()


async def _ended(future: Future[Engine]) -> None:
    """Wait for a future that others may wait for too."""
    await asyncio.shield(asyncio.wrap_future(future))
