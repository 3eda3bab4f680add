"""Work of a training by its number, whose bits don't depend on how many threads there are.

What torch sums with several threads is rounded by their number: least squares over the same rows differ between one and
two. So each piece of work, a text's gradient or its sums, is computed by one thread, and the pieces are added in the
order of their numbers; more threads compute more pieces at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

__all__ = ["Lanes"]

T = TypeVar("T")
U = TypeVar("U")


class Lanes:
    """Threads that work side by side. Within `with` torch's operators take one thread each, here too."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        self._before = 1

    @classmethod
    def of(cls, device: torch.device) -> Lanes:
        """As many as torch takes for its operators on a CPU; elsewhere one."""
        return cls(torch.get_num_threads() if device.type == "cpu" else 1)

    def __enter__(self) -> Lanes:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        if self.count > 1:  # a thread's products begin with as many as the system has
            self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        torch.set_num_threads(self._before)

    def map(self, work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
        """What `work` gives for each item, in their order; no more than there are lanes is computed ahead."""
        if self._pool is None:
            yield from map(work, items)
            return
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(self._pool.submit(work, item))
            if len(waiting) == self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
