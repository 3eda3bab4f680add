"""A queue from which what was abandoned is taken out: it holds no prompt that nobody waits for.

Takes and gives hashable values, each at most once; any thread may use it. Knows nothing of them.
"""

from __future__ import annotations

from threading import Condition
from typing import Generic, TypeVar

__all__ = ["Lane"]

Each = TypeVar("Each")


class Lane(Generic[Each]):
    """Values in order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[Each, None] = {}
        self._changed = Condition()
        self._closed = False

    def put(self, value: Each) -> None:
        with self._changed:
            self._waiting[value] = None
            self._changed.notify()

    def discard(self, value: Each) -> None:
        with self._changed:
            self._waiting.pop(value, None)

    def close(self) -> None:
        """Let those that wait for a value go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def get(self) -> Each | None:
        """The value that has waited longest; blocks until there is one, or the lane is closed (None)."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            value = next(iter(self._waiting))
            del self._waiting[value]
            return value
