"""Standard output: the answer in UTF-8 whatever the locale, each piece written at once.

Takes text; bypasses Python's own buffers, so that nothing is left to flush when the reader has closed the pipe. A
signal is raised only while waiting for a slow reader, never between writing a byte and counting it.
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
    """Raises BrokenPipeError when the reader has closed the pipe, and LongspecError for other write errors."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise LongspecError("Standard output is closed; the answer needs somewhere to go.")
        self._pending = bytearray()
        self._ends_line = True
        self._poll = select.poll()
        self._poll.register(_STDOUT, 0)  # errors are always reported

    def write(self, text: str) -> None:
        """Write the text, completely on return; after an exception, the next call writes the rest first."""
        self._pending += text.encode("utf-8", errors="replace")
        while self._pending:
            select.select([], [_STDOUT], [])
            with deferred():
                try:
                    written = os.write(_STDOUT, self._pending[:_PIECE_NBYTES])
                except BlockingIOError:  # another process filled the pipe first
                    continue
                except BrokenPipeError:
                    raise
                except OSError as error:
                    raise LongspecError(f"Standard output can't be written: {error.strerror}.") from error
                self._ends_line = self._pending[written - 1] == ord("\n")
                del self._pending[:written]

    def end_line(self) -> None:
        """Write a newline, unless the text ends with one."""
        ended = self._pending.endswith(b"\n") if self._pending else self._ends_line
        self.write("" if ended else "\n")

    def check(self) -> None:
        """Raise BrokenPipeError if the reader has closed the pipe, also while nothing is being written."""
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in self._poll.poll(0)):
            raise BrokenPipeError

    @property
    def is_ready(self) -> bool:
        """Whether a piece can be written without blocking."""
        return bool(select.select([], [_STDOUT], [], 0)[1])

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file, which no terminal shows, not even through another program."""
        return stat.S_ISREG(os.fstat(_STDOUT).st_mode)
