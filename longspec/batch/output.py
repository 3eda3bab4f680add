"""The output file of a batch: only complete lines, written by one process at a time.

Every line is appended by one write. After a kill the file holds complete lines and at most one partial last line,
which is removed on resuming. No other state of a job is stored: the finished records are those in this file.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from longspec.batch import beside, meta_path
from longspec.batch.about import write_json
from longspec.batch.marks import Marks
from longspec.batch.records import Past, past
from longspec.errors import LongspecError, UsageError
from longspec.machine.files import read_json
from longspec.requests.fields import RequestError, parse_object

__all__ = ["Output"]

_ABOUT_NBYTES = 1 << 20

_LINE_NBYTES = 256 << 20
"""More than the answer of any context; a longer line isn't ours."""


class Output:
    """The output file, locked while it is open.

    Raises:
        UsageError: it can't be written, isn't a regular file, or is locked by another process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _locked(path)
        self._size = os.fstat(self._fd).st_size

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_empty(self) -> bool:
        return self._size == 0

    def finished(self, *, retry_errors: bool = False) -> tuple[Marks, int]:
        """The records already there, and the number of error lines among them; a partial last line is removed.

        retry_errors: remove the error lines, so that their records are tried again.

        Raises:
            UsageError: a line wasn't written by longspec.
            LongspecError: the disk is full.
        """
        marks, failed, whole = Marks(), 0, 0
        for data, past_record in self._lines():
            whole += len(data)
            if past_record.failed:
                failed += 1
                if retry_errors:
                    continue
            marks.add(past_record.mark)
        if whole < self._size:
            os.ftruncate(self._fd, whole)
            self._size = whole
        if retry_errors and failed:
            self._without_errors()
            failed = 0
        return marks, failed

    def write(self, line: bytes) -> None:
        """Append the line, entirely or not at all.

        Raises:
            LongspecError: it can't be written, or the file was deleted; the batch can be resumed.
        """
        if os.fstat(self._fd).st_nlink == 0:
            raise LongspecError(f"{self.path} was deleted while it was being written; run the command again.")
        error: OSError | None = None
        try:
            written = os.write(self._fd, line)
        except OSError as failed:
            written, error = 0, failed
        if written == len(line):
            self._size += written
            return
        with suppress(OSError):
            os.ftruncate(self._fd, self._size)
        reason = "no space is left" if error is None else error.strerror
        raise LongspecError(
            f"{self.path} can't be written: {reason}; what is in it is whole, and the same command goes on from there."
        ) from error

    def read_about(self) -> Mapping[str, Any]:
        """The metadata beside the file. UsageError: there is none."""
        return read_json(meta_path(self.path), _ABOUT_NBYTES, "The record")

    def write_about(self, value: Mapping[str, Any]) -> None:
        """Store the metadata atomically. LongspecError: it can't be written."""
        write_json(meta_path(self.path), value)

    def close(self) -> None:
        """Flush the file to the disk, and close it."""
        with suppress(OSError):
            os.fsync(self._fd)
        os.close(self._fd)

    def _lines(self) -> Iterator[tuple[bytes, Past]]:
        """The complete lines, parsed; a last one without a newline is left out."""
        with open(self.path, "rb") as file:
            number = 0
            while data := file.readline(_LINE_NBYTES):
                number += 1
                if not data.endswith(b"\n"):
                    if len(data) == _LINE_NBYTES:
                        raise self._foreign(number, f"it has more than {_LINE_NBYTES:,} bytes")
                    return
                try:
                    said = past(parse_object(data.decode(), "it"))
                except (ValueError, RequestError) as wrong:
                    raise self._foreign(number, str(wrong).rstrip(".")) from None
                yield data, said

    def _foreign(self, number: int, reason: str) -> UsageError:
        return UsageError(
            f"Line {number} of {self.path} wasn't written by longspec batch ({' '.join(reason.split())}); name another "
            "output, or mend that line."
        )

    def _without_errors(self) -> None:
        """Replace the file by a copy without the error lines, locked before it is renamed."""
        place = beside(self.path)
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(fd, stat.S_IMODE(os.fstat(self._fd).st_mode))
            with open(fd, "ab", closefd=False) as file:
                for data, said in self._lines():
                    if not said.failed:
                        file.write(data)
            os.fsync(fd)
            os.replace(place, self.path)
        except OSError as error:
            os.close(fd)
            with suppress(OSError):
                place.unlink()
            raise LongspecError(
                f"{place} can't be written: {error.strerror}; make room, or leave the errors."
            ) from error
        old, self._fd = self._fd, fd
        os.close(old)
        self._size = os.fstat(fd).st_size


def _locked(path: Path) -> int:
    """A file descriptor, locked and open to append. Retries if the file was replaced meanwhile."""
    while True:
        try:
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} isn't a file; -o names one, since a batch is resumed from what is in it.")
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"{path} can't be written: {error.strerror}; name another output with -o.") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise UsageError(f"Another process is writing {path}; wait for it, or name another output.") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(fd)
            raise UsageError(f"{path} can't be locked: {error.strerror}; name an output on another disk.") from error
        os.close(fd)
