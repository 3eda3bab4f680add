"""SIGINT and SIGTERM as an exception that only the process's top level handles.

Raised at once everywhere but inside `deferred`, where the state must not be left half changed: there the first signal
waits for the block's end, and a second one is raised. A raised exception can get lost (Python drops it inside a
finaliser, and an interrupted import may turn it into an ImportError), so a signal stays noted until `answer`, and
`check` raises it again.
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
    """The process was asked to end. `exit_code` follows the shell's convention: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


def catch() -> None:
    """Make the signals raise `Interrupted`.

    Also where SIGINT was inherited as ignored: a script's shell starts background jobs so, and `kill -INT` should end
    them with their text so far.
    """
    for signum in _SIGNALS:
        signal.signal(signum, _handle)
    sys.unraisablehook = _drop


def ignore() -> None:
    """Ignore the signals: the process is about to exit."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def noted() -> Interrupted | None:
    """The signal that came and isn't handled yet."""
    return Interrupted(_noted[0]) if _noted else None


def check() -> None:
    """Raise the noted signal; to be called regularly in long loops."""
    if _noted:
        raise Interrupted(_noted[0])


def answer() -> None:
    """Mark the noted signal as handled; only another one is raised from here on."""
    _noted.clear()


@contextmanager
def deferred() -> Iterator[None]:
    """Within the block, a signal is only noted, unless it comes twice; it is raised at the end."""
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
    """Silence Python's message about an exception lost in a finaliser: `check` still has it."""
    if not issubclass(lost.exc_type, Interrupted):
        sys.__unraisablehook__(lost)
