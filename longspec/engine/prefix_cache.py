"""A session's rows for a text that begins like its own: from a file, as `--prompt-cache` keeps it, or from the session.

Takes sessions and empty caches; the file itself is `longspec.cache.snapshot`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longspec.cache.snapshot import Snapshot, check_place, save
from longspec.cache.stage import BLOCK, Cache
from longspec.engine.session import Session
from longspec.errors import UsageError
from longspec.model.load import Model

__all__ = ["keep", "resume", "take_over"]


def keep(session: Session, model: Model, path: Path) -> None:
    """Write the rows of the session's text, as far as its cache has them. LongspecError where that can't be done."""
    words = {**_words(model, session.cache_name), "long": str(session.long)}
    save(path, words, session.tokens[: session.cache.length], session.cache)


def resume(cache: Cache, name: str, model: Model, path: Path, tokens: Sequence[int], *, limit: int, long: bool) -> None:
    """Give an empty cache the rows that the file has of these tokens, if it is there: all but the last one's at most.

    A cache that can't be cut where the texts part stays empty, or short.

    Raises:
        UsageError: the file is damaged, or was made by another model, dtype or kind of cache.
    """
    check_place(path)
    if not path.exists():
        return
    snapshot = Snapshot(path)
    snapshot.check(_words(model, name))
    common = snapshot.common(tokens[:-1])
    # A longrope model's rows of a short text are of no use to a long one. What is longer than the whole text may
    # become would take memory that nobody planned.
    if not common or snapshot.identity.get("long") != str(long) or snapshot.length > limit:
        return
    snapshot.load(cache)
    if common < cache.length:
        cache.truncate(common)


def take_over(earlier: Session, fresh: Cache, tokens: Sequence[int], *, long: bool) -> Cache:
    """The cache of a text that is over, cut back to the rows that a new one begins with, its last one's never.

    The earlier session gets the fresh one, so that no third text takes rows that have changed meanwhile. A cache that
    can't be cut there begins anew; where none of its rows is of use, the new text has the fresh one.

    Raises:
        UsageError: the earlier text is still being written.
    """
    if earlier.finish_reason is None:
        raise UsageError("The earlier text is still being written; end it before another takes its cache.")
    rows = zip(earlier.tokens[: earlier.cache.length], tokens[:-1], strict=False)
    common = next((i for i, (old, new) in enumerate(rows) if old != new), min(earlier.cache.length, len(tokens) - 1))
    if not common or earlier.long != long:
        return fresh
    cache, earlier.cache = earlier.cache, fresh
    if common < cache.length:
        cache.truncate(common)
    return cache


def _words(model: Model, cache_name: str) -> dict[str, str]:
    """What must be the same for the rows to be."""
    return {**model.fingerprint, "cache": cache_name, "size of blocks": str(BLOCK)}
