"""Files by URL (s3://, gs://, ...), through fsspec as Ray reads them; each kind needs its package (s3fs, gcsfs)."""

from __future__ import annotations

from io import BufferedReader
from typing import Any

from longspec.errors import UsageError

__all__ = ["Object", "filesystem", "is_url", "open_url"]


def is_url(name: str) -> bool:
    return "://" in name


def filesystem(name: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path within it. UsageError: its package isn't installed."""
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{name} can't be opened: {' '.join(str(error).split()).rstrip('.')}.") from error
    return files, str(path)


class Object(BufferedReader):
    """An object of a storage, to read."""

    version: str  # what changes with its content


def open_url(name: str) -> Object:
    """Open an object. UsageError: it can't be read."""
    files, path = filesystem(name)
    try:
        found = Object(files.open(path, "rb"))
        found.version = str(files.ukey(path))
    except Exception as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"{name} can't be read: {said.rstrip('.')}; name a file that is there.") from error
    return found
