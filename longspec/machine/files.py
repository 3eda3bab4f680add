"""Files that are replaced whole or not at all, and files of anybody's that are read up to a size.

Takes paths; knows nothing of what is in a file but whether it is JSON.
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
    """The JSON object of an ordinary file of at most `limit` bytes, which a sentence calls `what`, "The skip set".

    Raises:
        `error`: it can't be read, or is something else; `hint` ends the sentence.
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
    """The bytes of an ordinary file, or of a pipe too, of which at most `limit` are read.

    Raises:
        `error`: it can't be read, is no such file, or holds more.
    """
    at_once = 0 if pipe else os.O_NONBLOCK  # to open a pipe that nobody writes to would take for ever
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
    """Write a file beside the path, then put it there: another process reads the old one or the new one.

    It has the mode of the one that was there; a new one is for all to read, or private.

    Raises:
        OSError: it can't be written. What was there stays.
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
