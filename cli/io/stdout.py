"""Standard output: the answer's bytes, in UTF-8 whatever the locale, each piece in the reader's hands at once.

Takes text; writes past Python's own buffers, so that nothing is left to be flushed when the reader has gone. A signal
is raised only where a slow reader is waited for, never between a byte's leaving and its being counted.
"""

from __future__ import annotations

import os
import select
import stat
import sys

from longspec.cli.io.signals import deferred
from longspec.errors import LongspecError

__all__ = ["Output"]

_STDOUT = 1
_PIECE_NBYTES = 4096
"""What fits for certain where a pipe is ready: PIPE_BUF on Linux. More could block, deaf to signals."""


class Output:
    """Raises BrokenPipeError when the reader has gone, and LongspecError when the bytes can't be written otherwise."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise LongspecError("Standard output is closed; the answer needs somewhere to go.")
        self._pending = bytearray()
        self._ends_line = True
        self._poll = select.poll()
        self._poll.register(_STDOUT, 0)  # errors are always told

    def write(self, text: str) -> None:
        """The text is written when this returns; what an exception leaves of it, the next call writes first."""
        self._pending += text.encode("utf-8", errors="replace")
        while self._pending:
            select.select([], [_STDOUT], [])
            with deferred():
                try:
                    written = os.write(_STDOUT, self._pending[:_PIECE_NBYTES])
                except BlockingIOError:  # another writer was faster
                    continue
                except BrokenPipeError:
                    raise
                except OSError as error:
                    raise LongspecError(f"Standard output can't be written: {error.strerror}.") from error
                self._ends_line = self._pending[written - 1] == ord("\n")
                del self._pending[:written]

    def end_line(self) -> None:
        """What follows stands on a line of its own."""
        ended = self._pending.endswith(b"\n") if self._pending else self._ends_line
        self.write("" if ended else "\n")

    def check(self) -> None:
        """Raises BrokenPipeError if nobody reads any longer, also while nothing is being written."""
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in self._poll.poll(0)):
            raise BrokenPipeError

    @property
    def is_ready(self) -> bool:
        """A piece can be written without waiting for the reader."""
        return bool(select.select([], [_STDOUT], [], 0)[1])

    @property
    def is_file(self) -> bool:
        """What is written here appears on no terminal, not even through another program."""
        return stat.S_ISREG(os.fstat(_STDOUT).st_mode)
