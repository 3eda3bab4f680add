"""An output that is a folder of files, each written whole: on object storage, where nothing can be appended to, and in
Parquet, whose end says where all of it is.

A file of some hundred lines is added when it is full, and when half a minute has gone: what a kill loses beside the
answers under way are those that no file has yet. As in `longspec.batch.output`, what is finished is what stands there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from longspec.batch import parquet
from longspec.batch.marks import Marks
from longspec.batch.records import Past, past
from longspec.batch.remote import filesystem
from longspec.errors import LongspecError, UsageError
from longspec.requests.fields import RequestError, parse_object

__all__ = ["Parts"]

_LINES, _NBYTES, _SECONDS = 500, 16 << 20, 30.0
"""Of a file, at most."""

_ABOUT = "_about.json"


class Parts:
    """The folder. On this machine's own disks it is locked while it is open; object storage has no locks.

    Raises:
        UsageError: it can't be written, or is locked by another process.
    """

    def __init__(self, name: str) -> None:
        self.path = name.rstrip("/")
        self._files, self._root = filesystem(self.path)
        self._kind = "parquet" if self.path.endswith(".parquet") else "jsonl"
        self._waiting: list[bytes] = []
        self._nbytes, self._since = 0, 0.0
        self._lock: int | None = None
        try:
            self._files.makedirs(self._root, exist_ok=True)
            if self._is_local:
                self._lock = os.open(self._root, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._parts = self._listed()
        except BlockingIOError:
            raise UsageError(f"Another process is writing {self.path}; wait for it, or name another output.") from None
        except Exception as error:
            raise UsageError(f"{self.path} can't be written: {_reason(error)}; name another output with -o.") from error
        self._number = 1 + max((int(part.rpartition("/")[2][5:13]) for part in self._parts), default=0)

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_empty(self) -> bool:
        return not self._parts

    def finished(self, *, retry_errors: bool = False) -> tuple[Marks, int]:
        """As of `Output`."""
        marks, failed = Marks(), 0
        for part in self._parts:
            kept = []
            for line, said in self._lines(part):
                failed += said.failed
                if not (retry_errors and said.failed):
                    kept.append(line)
                    marks.add(said.mark)
            if retry_errors and len(kept) < len([*self._lines(part)]):
                self._put(part, kept)
        return marks, 0 if retry_errors else failed

    def write(self, line: bytes) -> None:
        """Keep the line for the next file, and write that if it is time. LongspecError: it can't be written."""
        if not self._waiting:
            self._since = monotonic()
        self._waiting.append(line)
        self._nbytes += len(line)
        if len(self._waiting) >= _LINES or self._nbytes >= _NBYTES or monotonic() - self._since > _SECONDS:
            self._flush()

    def close(self) -> None:
        """Write what waits, and let go of the lock."""
        try:
            self._flush()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def read_about(self) -> Mapping[str, Any]:
        """The metadata. UsageError: there is none."""
        try:
            found = parse_object(self._files.cat_file(f"{self._root}/{_ABOUT}").decode(), "it")
        except (OSError, ValueError, RequestError) as error:
            raise UsageError(f"{self.path}/{_ABOUT} can't be read: {_reason(error)}.") from error
        return found

    def write_about(self, value: Mapping[str, Any]) -> None:
        self._put(f"{self._root}/{_ABOUT}", [json.dumps(value, indent=2).encode()], raw=True)

    @property
    def _is_local(self) -> bool:
        return "file" in (self._files.protocol if isinstance(self._files.protocol, tuple) else (self._files.protocol,))

    def _listed(self) -> list[str]:
        self._files.invalidate_cache()
        return sorted(self._files.glob(f"{self._root}/part-{'[0-9]' * 8}.{self._kind}"))

    def _flush(self) -> None:
        if self._waiting:
            self._put(f"{self._root}/part-{self._number:08}.{self._kind}", self._waiting)
            self._number, self._waiting, self._nbytes = self._number + 1, [], 0

    def _put(self, place: str, lines: list[bytes], *, raw: bool = False) -> None:
        """Write a file, whole or not at all: an object is there once it was sent, a file once it was renamed."""
        data = b"".join(lines) if raw or self._kind == "jsonl" else parquet.table(lines)
        try:
            if self._is_local:
                Path(f"{place}.tmp").write_bytes(data)
                os.replace(f"{place}.tmp", place)
            else:
                self._files.pipe_file(place, data)
        except Exception as error:
            with suppress(OSError):
                Path(f"{place}.tmp").unlink(missing_ok=True)
            raise LongspecError(
                f"{place} can't be written: {_reason(error)}; the same command goes on from what is there."
            ) from error

    def _lines(self, part: str) -> Iterator[tuple[bytes, Past]]:
        data = self._files.cat_file(part)
        found = parquet.lines(data, part) if self._kind == "parquet" else data.splitlines(keepends=True)
        for number, line in enumerate(found, 1):
            try:
                yield line, past(parse_object(line.decode(), "it"))
            except (ValueError, RequestError) as wrong:
                raise UsageError(
                    f"Line {number} of {part} wasn't written by longspec batch ({wrong}); name another output."
                ) from None


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__).rstrip(".")
