"""Files that are there whole or not at all: written beside their place, on the disk before they take it.

Takes a path and what writes a file; knows nothing of what is in it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["replaced"]


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
