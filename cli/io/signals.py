"""SIGINT and SIGTERM as an exception that only the process itself ends.

Raised at once everywhere but inside `deferred`, where the state must not be left half changed: there the first signal
waits for the end, and a second one is raised. What is raised can be lost (Python drops it inside a finaliser, and half
an import may turn it into an ImportError), so a signal stays noted until it is answered, and `check` raises it again.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "answer", "catch", "check", "deferred", "ignore", "noted"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_noted: list[int] = []
_deferring = False


class Interrupted(BaseException):
    """Somebody asked the process to end. `exit_code` is the shell's convention: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


def catch() -> None:
    """From here on the signals raise `Interrupted`.

    Also where SIGINT was inherited as ignored: a script's shell starts its background jobs so, and `kill -INT` should
    end them with what they have written.
    """
    for signum in _SIGNALS:
        signal.signal(signum, _handle)
    sys.unraisablehook = _drop


def ignore() -> None:
    """From here on the signals do nothing: the process is about to end by itself."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def noted() -> Interrupted | None:
    """The signal that came and hasn't been answered."""
    return Interrupted(_noted[0]) if _noted else None


def check() -> None:
    """Raise what is noted: to be called now and then by whatever goes on for long."""
    if _noted:
        raise Interrupted(_noted[0])


def answer() -> None:
    """What came has been answered; only another signal is raised from here on."""
    _noted.clear()


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal is only noted, unless it comes twice; it is raised at the end."""
    global _deferring
    check()
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    check()


def _handle(signum: int, frame: FrameType | None) -> None:
    waits = _deferring and not _noted
    _noted.append(signum)
    if not waits:
        raise Interrupted(signum)


def _drop(lost: sys.UnraisableHookArgs) -> None:
    """What Python would say of a signal that it lost: `check` has it still."""
    if not issubclass(lost.exc_type, Interrupted):
        sys.__unraisablehook__(lost)
