"""Rows of finished texts in files: what memory doesn't hold, and what a server had when it ended.

A folder of snapshots (`longspec.cache.snapshot`), each named by its tokens and written in a thread of its own, one at a
time: what comes meanwhile is not kept. What was used least recently goes first. Files of other models, and damaged
ones, are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Thread
from time import monotonic

from longspec.cache.snapshot import Snapshot, save
from longspec.cache.stage import Cache
from longspec.errors import LongspecError, UsageError

__all__ = ["Found", "Shelf"]

_LAST = ".rows"
_Text = tuple[list[int], Cache | None, int, bool]  # tokens, cache, those of the prompt, long


@dataclass(frozen=True, slots=True)
class Found:
    """A text's rows in a file."""

    path: Path
    tokens: list[int]
    prompt: int
    long: bool


class Shelf:
    """At most `most` bytes of files in a folder. identity: what a snapshot must say for its rows to be valid."""

    def __init__(self, folder: Path, most: int, identity: Mapping[str, str]) -> None:
        self.folder, self.most, self.identity = folder, most, identity
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            seen = folder.stat()
        except OSError as error:
            raise UsageError(f"The folder {folder} for prefixes can't be made: {error.strerror}.") from error
        if (hasattr(os, "getuid") and seen.st_uid != os.getuid()) or seen.st_mode & 0o077:
            raise UsageError(
                f"The folder {folder} for prefixes isn't yours alone, and its files tell what was written; close it to "
                "others (chmod 700), or name another."
            )
        self._writing: Thread | None = None

    def found(self) -> Iterator[Found]:
        """The texts of this model, those used last at the end."""
        for path, _ in self._files():
            with suppress(LongspecError, OSError):
                snapshot = Snapshot(path)
                snapshot.check(self.identity)
                prompt = snapshot.identity.get("prompt", "")
                number = min(int(prompt), snapshot.length) if prompt.isascii() and prompt.isdigit() else 0
                if snapshot.length:
                    yield Found(path, snapshot.tokens, number, snapshot.identity.get("long") == "True")

    def put(self, tokens: list[int], cache: Cache, prompt: int, *, long: bool) -> Path | None:
        """Begin to write a cache that nobody changes any more; its file, or None while another one is written."""
        if self._writing is not None and self._writing.is_alive():
            return None
        path = self._place(tokens, long=long)
        self._writing = Thread(target=self._save, args=(path, tokens, cache, prompt, long), daemon=True)
        self._writing.start()
        return path

    def load(self, path: Path, cache: Cache, length: int) -> bool:
        """Fill an empty cache; whether a file of so many rows is there and whole."""
        try:
            snapshot = Snapshot(path)
            snapshot.check(self.identity)
            if snapshot.length != length:
                return False
            snapshot.load(cache)
            os.utime(path)
        except (LongspecError, OSError, MemoryError):
            return False
        return True

    def forget(self, path: Path) -> None:
        """Take a file away."""
        with suppress(OSError):
            path.unlink()

    def close(self, texts: Iterable[_Text], seconds: float) -> None:
        """Write these too, for as long as there is time."""
        end = monotonic() + seconds
        if self._writing is not None:
            self._writing.join(seconds)
        for tokens, cache, prompt, long in texts:
            if monotonic() >= end:
                return
            if cache is not None:
                self._save(self._place(tokens, long=long), tokens, cache, prompt, long)

    def _place(self, tokens: list[int], *, long: bool) -> Path:
        said = repr((sorted(self.identity.items()), long, tokens))
        return self.folder / f"{sha256(said.encode()).hexdigest()[:32]}{_LAST}"

    def _save(self, path: Path, tokens: list[int], cache: Cache, prompt: int, long: bool) -> None:
        with suppress(LongspecError, OSError):  # a full disk costs nobody a text
            save(path, {**self.identity, "long": str(long), "prompt": str(prompt)}, tokens, cache)
            files = [*self._files()]
            held = sum(nbytes for _, nbytes in files)
            for old, nbytes in files:
                if held <= self.most:
                    return
                old.unlink()
                held -= nbytes

    def _files(self) -> list[tuple[Path, int]]:
        """The files and their bytes, those used last at the end."""
        found = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                if path.suffix == _LAST and path.is_file() and not path.is_symlink():
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, path, stat.st_size))
        return [(path, nbytes) for _, path, nbytes in sorted(found)]
