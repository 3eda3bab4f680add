"""Files that are replaced atomically, and untrusted files that are read up to a size limit.

Takes paths; knows nothing of a file's content but whether it is JSON.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from longspec.errors import LongspecError, UsageError

__all__ = ["read_bytes", "read_json", "replaced"]


def read_json(
    path: Path, limit: int, what: str, *, hint: str = "", error: type[LongspecError] = UsageError
) -> dict[str, Any]:
    """The JSON object of a regular file of at most `limit` bytes. what: its name in an error, such as "The skip set".

    Raises:
        `error`: it can't be read, or isn't a JSON object; `hint` ends the message.
    """
    data = read_bytes(path, limit, what, hint=hint, error=error)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise error(_sentence(f"{what} {path} isn't a JSON object", hint))
    return value


def read_bytes(
    path: Path,
    limit: int,
    what: str,
    *,
    hint: str = "",
    error: type[LongspecError] = UsageError,
    pipe: bool = False,
) -> bytes:
    """The bytes of a regular file (with `pipe`, also of a pipe), reading at most `limit` of them.

    Raises:
        `error`: it can't be read, isn't such a file, or is longer.
    """
    at_once = 0 if pipe else os.O_NONBLOCK  # opening a pipe without a writer would block
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
            if not pipe and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(_sentence(f"{what} {path} isn't an ordinary file", hint))
            data = file.read(limit + 1)
    except OSError as problem:
        raise error(_sentence(f"{what} {path} can't be read: {problem.strerror or problem}", hint)) from problem
    if len(data) > limit:
        size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
        raise error(_sentence(f"{what} {path} holds more than {size}", hint))
    return data


def _sentence(problem: str, hint: str) -> str:
    return f"{problem}; {hint}." if hint else f"{problem}."


def replaced(path: Path, write: Callable[[Path], object], *, private: bool = False) -> None:
    """Write a temporary file in the same folder, then rename it to the path: other processes see the old file or the
    new one.

    The new file keeps the old one's mode; without an old one it is readable by all, or private.

    Raises:
        OSError: it can't be written. The old file stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    made = Path(name)
    try:
        write(made)
        mode = 0o600 if private else 0o644
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(path.stat().st_mode)
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        made.chmod(mode)
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
