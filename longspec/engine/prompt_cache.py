"""Prefix reuse: a new sequence takes cached rows of the same prefix from a file (`--prompt-cache`) or a session.

Takes sessions and empty caches; the file format is `longspec.cache.snapshot`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longspec.cache.snapshot import Snapshot, check_place, save
from longspec.cache.stage import BLOCK, Cache
from longspec.engine.session import Session
from longspec.errors import UsageError
from longspec.model.load import Model

__all__ = ["identity", "keep", "resume", "take_over"]


def keep(session: Session, model: Model, path: Path) -> None:
    """Write the rows of the session's tokens that its cache holds. LongspecError where the file can't be written."""
    words = {**identity(model, session.cache_name), "long": str(session.long)}
    save(path, words, session.tokens[: session.cache.length], session.cache)


def resume(cache: Cache, name: str, model: Model, path: Path, tokens: Sequence[int], *, limit: int, long: bool) -> None:
    """Load the file's rows for the common prefix with `tokens`, at most all but the last, into an empty cache.

    A missing file leaves the cache empty; a cache that can't be truncated to the common prefix stays empty, or
    shorter.

    Raises:
        UsageError: the file is damaged, or was made by another model, dtype or kind of cache.
    """
    check_place(path)
    if not path.exists():
        return
    snapshot = Snapshot(path)
    snapshot.check(identity(model, name))
    # A longrope model's rows of a short sequence are rotated by other factors than a long one's. More rows than
    # `limit` would take memory that isn't planned.
    if snapshot.identity.get("long") != str(long) or snapshot.length > limit:
        return
    if not (common := snapshot.common(tokens[:-1])):
        return
    snapshot.load(cache)
    if common < cache.length:
        cache.truncate(common)


def take_over(earlier: Session, fresh: Cache, tokens: Sequence[int], *, long: bool) -> Cache:
    """Take a finished session's cache, truncated to the common prefix, the new prompt's last token excluded.

    The earlier session gets the fresh cache in exchange, so that no third one takes rows that have changed meanwhile.
    A cache that can't be truncated there is emptied; with no common prefix, the new sequence keeps the fresh cache.

    Raises:
        UsageError: the earlier sequence is still being decoded.
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


def identity(model: Model, cache_name: str) -> dict[str, str]:
    """What a snapshot of a model's rows says of them: they are used only where all of it is equal."""
    return {**model.fingerprint, "cache": cache_name, "size of blocks": str(BLOCK)}
