"""Files that are replaced atomically, and files from elsewhere, of which none is trusted.

What others wrote is opened here: ordinary files only, whose open never waits, each up to a limit, JSON up to a depth.
Takes paths; knows nothing of a file's content but whether it is text or JSON (`longspec.machine.schema` looks into it).
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from longspec.errors import LongspecError, UsageError

__all__ = ["MOST_DEPTH", "opened", "parse_json", "read_bytes", "read_json", "read_text", "replaced"]

MOST_DEPTH = 64
"""Arrays and objects within each other in a JSON file; a config has six."""


@contextmanager
def opened(
    path: Path, what: str, *, hint: str = "", error: type[LongspecError] = UsageError, pipe: bool = False
) -> Iterator[BufferedReader]:
    """An ordinary file (with `pipe`, also a pipe), open for reading. what: its name in an error ("The skip set").

    Raises:
        `error`: it can't be opened or read, or isn't such a file; `hint` ends the message.
    """
    at_once = 0 if pipe else os.O_NONBLOCK  # opening a pipe without a writer would block
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
            if not pipe and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(_sentence(f"{what} {path} isn't an ordinary file", hint))
            yield file
    except OSError as problem:
        raise error(_sentence(f"{what} {path} can't be read: {problem.strerror or problem}", hint)) from problem
    except ValueError as problem:  # a NUL or half a character in its name
        if "\0" in str(path) or isinstance(problem, UnicodeEncodeError):
            raise error(_sentence(f"{what} {str(path)!r} has a name that no file can have", hint)) from problem
        raise


def read_bytes(
    path: Path,
    limit: int,
    what: str,
    *,
    hint: str = "",
    error: type[LongspecError] = UsageError,
    pipe: bool = False,
) -> bytes:
    """The bytes of a file that `opened` takes, reading at most `limit` of them.

    Raises:
        `error`: it can't be read, isn't such a file, or is longer.
    """
    with opened(path, what, hint=hint, error=error, pipe=pipe) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
        raise error(_sentence(f"{what} {path} holds more than {size}", hint))
    return data


def read_text(path: Path, limit: int, what: str, *, hint: str = "", error: type[LongspecError] = UsageError) -> str:
    """The text of an ordinary file in UTF-8, of at most `limit` bytes.

    Raises:
        `error`: it can't be read, isn't an ordinary file, is longer, or isn't UTF-8.
    """
    try:
        return read_bytes(path, limit, what, hint=hint, error=error).decode()
    except UnicodeDecodeError as problem:
        raise error(_sentence(f"{what} {path} isn't UTF-8 at byte {problem.start:,}", hint)) from problem


def read_json(
    path: Path, limit: int, what: str, *, hint: str = "", error: type[LongspecError] = UsageError
) -> dict[str, Any]:
    """The JSON object of an ordinary file of at most `limit` bytes, nested up to MOST_DEPTH.

    Raises:
        `error`: it can't be read, or isn't such an object.
    """
    data = read_bytes(path, limit, what, hint=hint, error=error)
    try:
        value = parse_json(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise error(_sentence(f"{what} {path} isn't a JSON object", hint))
    return value


def parse_json(data: bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text, nested up to MOST_DEPTH. The caller bounds its length: a byte becomes up to 25.

    Raises:
        ValueError: it isn't JSON, is nested deeper, has half a character, or with `unique` a name twice in one object.
    """
    try:
        value = json.loads(data, object_pairs_hook=_without_duplicates if unique else None)
    except RecursionError:
        raise ValueError(f"arrays and objects are nested deeper than {MOST_DEPTH}") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [item for each in inner for item in each if isinstance(item, dict | list)]
        if not level:
            break
    else:
        raise ValueError(f"arrays and objects are nested deeper than {MOST_DEPTH}")
    if b"\\u" in data:
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # a lone surrogate is no text: UnicodeEncodeError is a ValueError
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands in it twice")
    return values


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
