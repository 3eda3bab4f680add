"""An output file that is replaced atomically: FILE is unchanged, or has the whole answer.

Takes text as `Output` does, and writes it to FILE.part as it arrives; the complete file is renamed to FILE. A signal,
an error or a power cut leaves FILE.part and an unchanged FILE.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from longspec.cli.io.signals import deferred
from longspec.errors import LongspecError, UsageError

__all__ = ["OutputFile"]


class OutputFile:
    """Opened before the model is loaded, so that an unwritable folder is reported at once."""

    is_ready = True
    is_file = True

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._path = Path(os.path.realpath(name))  # a symbolic link stays, and its target is written
        self._part = Path(f"{self._path}.part")
        self._say = say
        self._ends_line = True

    def __enter__(self) -> OutputFile:
        with self._told(UsageError), ExitStack() as undo:
            mode = self._path.stat().st_mode if self._path.exists() else None
            if mode is not None and not stat.S_ISREG(mode):
                raise UsageError(f"{self._path} isn't an ordinary file; leave --output out and use > instead.")
            # Don't follow a link and don't block on a pipe: in a shared folder, others may have created the file.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._number = os.open(self._part, flags, 0o666)
            undo.callback(os.close, self._number)
            if not stat.S_ISREG(os.fstat(self._number).st_mode):
                raise UsageError(f"{self._part} isn't an ordinary file; remove it, or name another one.")
            self._own()
            if mode is not None:
                os.fchmod(self._number, stat.S_IMODE(mode))
            os.ftruncate(self._number, 0)
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._told():
                if kind is None:
                    with deferred():
                        self._finish()
                elif os.fstat(self._number).st_size == 0:
                    self._part.unlink()
                else:
                    self._say(f"what was written is in {self._part}")
        finally:
            os.close(self._number)

    def write(self, text: str) -> None:
        """Write the text to the file, completely on return."""
        data = text.encode("utf-8", errors="replace")
        with self._told(), deferred():
            if data:
                self._ends_line = data.endswith(b"\n")
            while data:
                data = data[os.write(self._number, data) :]

    def end_line(self) -> None:
        """Write a newline, unless the text ends with one."""
        self.write("" if self._ends_line else "\n")

    def check(self) -> None:
        """Does nothing: a file has no reader that could close it."""

    def _own(self) -> None:
        """Check that no other run writes this part, and that it hasn't been renamed to that run's answer."""
        with suppress(BlockingIOError):
            fcntl.flock(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self._number), os.lstat(self._part)):
                return
        raise UsageError(f"{self._part} is being written by another run; name another file.")

    def _finish(self) -> None:
        os.fsync(self._number)
        os.replace(self._part, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextmanager
    def _told(self, kind: type[LongspecError] = LongspecError) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise kind(f"{self._part} can't be written: {error.strerror}; name another file.") from error
