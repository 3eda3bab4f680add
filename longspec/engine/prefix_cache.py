"""Rows of finished texts, kept for prompts that begin alike: the next turn of a chat reads its new tokens only.

Takes sessions; gives caches. Knows no request and no order of passes. The text that was used least recently goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from longspec.cache.stage import BLOCK, Cache
from longspec.engine.session import Session
from longspec.errors import LongspecError

__all__ = ["Prefixes", "common"]

_NEARLY_ALL = 0.9
"""Of a text's rows: who goes on from so many takes the cache itself. A fork of a fork of a fork has many pieces, which
every later pass reads one by one."""


@dataclass(slots=True, eq=False)
class _Kept:
    tokens: list[int]
    cache: Cache
    cache_name: str
    long: bool  # rotated for a sequence beyond a longrope model's original context

    @property
    def nbytes(self) -> int:
        room = self.cache.room(self.cache.length)
        return room.device + room.host


class Prefixes:
    """At most `most` bytes of rows."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: list[_Kept] = []  # the last used one last

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._kept)

    def keep(self, session: Session) -> None:
        """Keep a finished session's cache, which nobody writes to any more."""
        tokens = session.tokens[: session.cache.length]
        if self.most <= 0 or len(tokens) < BLOCK:
            return
        kept = _Kept(tokens, session.cache, session.cache_name, session.long)
        if kept.nbytes > self.most:
            return
        # What this text begins with is in it.
        self._kept = [one for one in self._kept if one.long != kept.long or one.tokens != tokens[: len(one.tokens)]]
        self._kept.append(kept)
        while self.nbytes > self.most:
            del self._kept[0]

    def shared(self, session: Session) -> int:
        """How many rows of the session's prompt are kept: 0, or a block at least."""
        return self._best(session)[1]

    def give(self, session: Session) -> None:
        """Give these rows to a session with an empty cache."""
        kept, length = self._best(session)
        if kept is None:
            return
        whole = length >= _NEARLY_ALL * len(kept.tokens) and kept.cache.can_cut_anywhere
        self._kept.remove(kept)
        with suppress(LongspecError, OSError, MemoryError):  # only an optimisation: without it the rows are read
            if whole:
                kept.cache.truncate(length)
                session.cache = kept.cache
            else:
                self._kept.append(kept)
                session.cache = kept.cache.fork(length)
            session.cache_name, session.cached = kept.cache_name, session.cache.length

    def _best(self, session: Session) -> tuple[_Kept | None, int]:
        prompt = session.tokens[:-1]
        alike = [(common(one.tokens, prompt), one) for one in self._kept if one.long == session.long]
        length, kept = max(alike, key=lambda each: each[0], default=(0, None))
        return (kept, length) if length >= BLOCK else (None, 0)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix."""
    at, most = 0, min(len(one), len(other))
    while at < most and one[at : at + BLOCK] == other[at : at + BLOCK]:
        at += BLOCK
    rest = zip(one[at : at + BLOCK], other[at : at + BLOCK], strict=False)
    return next((at + i for i, (a, b) in enumerate(rest) if a != b), min(at + BLOCK, most) if at < most else most)
