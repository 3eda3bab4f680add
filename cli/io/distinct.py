"""The files of a command, compared with each other before anything is written.

Takes names as they were given; knows no option. Links and other spellings of a name are the same file; pipes and
devices are none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from longspec.errors import UsageError

__all__ = ["refuse_same_files"]

Name = str | Path | None
"""None and - stand for no file."""


def refuse_same_files(written: Mapping[str, Name], read: Iterable[Name] = ()) -> None:
    """Raise UsageError where a file that is written, by what it holds ("the output"), is written twice or read."""
    known: dict[object, str] = {}
    for what, name in written.items():
        if (key := _key(name)) is not None:
            _check(name, known.get(key))
            known[key] = what
    for name in read:
        if (key := _key(name)) is not None:
            _check(name, known.get(key))


def _check(name: Name, what: str | None) -> None:
    if what is not None:
        raise UsageError(f"{name} is {what} too, so that one would be written over; name another file.")


def _key(name: Name) -> object | None:
    """What is equal for two names of one file; None where there is nothing to write over."""
    if name is None or str(name) == "-":
        return None
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return os.path.realpath(os.fsencode(name).replace(b"\0", b""))
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None
