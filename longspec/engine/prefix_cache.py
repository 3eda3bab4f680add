"""Rows of finished texts, kept for prompts that begin alike: the next turn of a chat reads its new tokens only.

A radix tree. A node stands for a text's beginning and may have its rows, as a fork that nobody writes to:

    who goes on behind a kept text's prompt     takes the cache itself, and leaves a fork: later passes read one piece
    who goes on before that                     begins with a copy that later ones share (a system prompt's rows)

What is used least recently goes first: out of memory, to files if there is a shelf for them. Bytes are those of the
distinct tensors that the nodes hold, so that what two texts share is counted once.

Takes sessions; gives caches. Knows no request and no order of passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from longspec.cache.stage import BLOCK, Cache
from longspec.engine.prefix_shelf import Shelf
from longspec.engine.session import Session
from longspec.errors import LongspecError

__all__ = ["Prefixes", "common"]

_REOPENED = 4
"""Tokens of a prompt's end that its next turn may lack: a template that opens the thoughts doesn't repeat that."""


_LEAST = 16
"""Tokens of a text that is kept: who goes on from it takes what there is. Others share a block or more, as every later
pass reads each piece of a cache for itself.
"""


@dataclass(slots=True, eq=False)
class _Node:
    parent: _Node | None
    tokens: list[int]  # behind the parent's
    depth: int  # tokens from the root on
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token
    cache: Cache | None = None  # of all tokens from the root on
    held: dict[int, int] = field(default_factory=dict)  # the cache's tensors: where they lie, and their bytes
    prompt: int = 0  # of these tokens, those that a user gave
    is_shared: bool = False  # made for several texts, and not one text's end
    file: Path | None = None
    used: int = 0

    @property
    def path(self) -> list[int]:
        """All tokens from the root on."""
        parts, at = list[list[int]](), self
        while at.parent is not None:
            parts.append(at.tokens)
            at = at.parent
        return [token for part in reversed(parts) for token in part]

    def __iter__(self) -> Iterator[_Node]:
        """The node and all behind it: without recursion, as a stranger's prompts may make the tree deep."""
        coming = [self]
        while coming:
            node = coming.pop()
            yield node
            coming += node.children.values()


class Prefixes:
    """At most `most` bytes of rows in caches of one kind, of which `empty` gives an empty one. shelf: where rows are
    put that memory doesn't hold.
    """

    def __init__(self, most: int, kind: str, empty: Callable[[], Cache], shelf: Shelf | None = None) -> None:
        self.most, self.kind = most, kind
        self.nbytes = 0
        self._empty, self._shelf = empty, shelf
        self._roots = {long: _Node(None, [], 0) for long in (False, True)}  # rotated for a longrope model's long texts
        self._held = Counter[int]()
        self._clock = 0
        for found in shelf.found() if shelf is not None else ():
            node = self._at(self._roots[found.long], found.tokens)
            node.file, node.prompt = found.path, found.prompt
            self._touch(node)

    def keep(self, session: Session) -> None:
        """Keep a finished session's cache, which nobody writes to any more."""
        tokens, root = session.tokens[: session.cache.length], self._roots[session.long]
        if self.most <= 0 or len(tokens) < _LEAST or session.cache_name != self.kind:
            return
        node, length = _find(root, tokens)
        if length == len(tokens) and (there := _newest(node)) is not None:
            self._touch(there)
            return
        node = self._at(root, tokens)
        self._put(node, session.cache, session.prompt_length)
        before = node.parent
        if before is not None and not before.is_shared and len(before.children) == 1:
            self._drop(before)  # its rows are in this one
        self._limit()

    def shared(self, session: Session) -> int:
        """How many rows of the session's prompt are kept for it."""
        return self._source(session)[1]

    def give(self, session: Session) -> None:
        """Give these rows to a session with an empty cache."""
        root, tokens = self._roots[session.long], session.tokens[:-1]
        source, length = self._source(session)
        if source is None:
            return
        self._touch(source)
        with suppress(LongspecError, OSError, MemoryError):  # only an optimisation: without it the rows are read
            cache = self._cache(source)
            if cache is None:
                return
            goes_on, given = _goes_on(source, length), cache.fork(length)
            if given.length < (1 if goes_on else BLOCK):
                return
            if not goes_on and given.length < source.depth:
                given = self._shared_by_all(given, root, tokens[: given.length])
            elif goes_on and cache.can_cut_anywhere:
                left, given = given, cache
                self._drop(source)
                given.truncate(length)
                self._put(self._at(root, tokens[:length]), left, source.prompt)
            session.cache, session.cache_name, session.cached = given, self.kind, given.length
        self._limit()

    def _source(self, session: Session) -> tuple[_Node | None, int]:
        """Whose rows the session's prompt may have, and how many of them; 0 where there are none."""
        node, length = _find(self._roots[session.long], session.tokens[:-1])
        source = _newest(node) if length >= _LEAST and session.cache_name == self.kind else None
        if source is None or (length < BLOCK and not _goes_on(source, length)):
            return None, 0
        return source, length

    def let_go(self) -> bool:
        """Free the rows that were used least recently; whether there were any."""
        kept = [(node, long) for long, root in self._roots.items() for node in root if node.cache is not None]
        if not kept:
            return False
        last, long = min(kept, key=lambda each: (each[0].used, -each[0].depth))
        if self._shelf is not None and last.cache is not None and last.file is None and not last.is_shared:
            last.file = self._shelf.put(last.path, last.cache, last.prompt, long=long)
        self._uncount(last)
        self._tidy(last)
        return True

    def close(self, seconds: float) -> None:
        """Put all rows on the shelf, the last used ones first, within so many seconds."""
        if self._shelf is None:
            return
        kept = [(node, long) for long, root in self._roots.items() for node in root if node.cache is not None]
        kept = [(node, long) for node, long in kept if node.file is None and not node.is_shared]
        newest = sorted(kept, key=lambda each: -each[0].used)
        self._shelf.close(((node.path, node.cache, node.prompt, long) for node, long in newest), seconds)

    def _shared_by_all(self, fork: Cache, root: _Node, tokens: list[int]) -> Cache:
        """A fork of a copy that the tree keeps: it holds none of the tensors of the text that was forked."""
        node, length = _find(root, tokens)
        if node.cache is None or not length == node.depth == len(tokens):
            room = fork.room(fork.length)
            self._limit(room.device + room.host)
            named, cache = dict(fork.state()), self._empty()
            cache.load_state(fork.length, lambda name, shape, dtype: named[name])
            node = self._at(root, tokens)
            self._put(node, cache, 0, is_shared=True)
        assert node.cache is not None
        return node.cache.fork(len(tokens))

    def _cache(self, node: _Node) -> Cache | None:
        """The node's cache, read where it is in a file; None where that can't be."""
        if node.cache is None and node.file is not None and self._shelf is not None:
            cache = self._empty()
            if not self._shelf.load(node.file, cache, node.depth):
                node.file = None
                self._tidy(node)
                return None
            self._put(node, cache, node.prompt)
        return node.cache

    def _limit(self, more: int = 0) -> None:
        """Let go of rows until so many bytes more would have room."""
        while self.nbytes + more > self.most and self.let_go():
            pass

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        at: _Node | None = node
        while at is not None:
            at.used, at = self._clock, at.parent

    def _put(self, node: _Node, cache: Cache, prompt: int, *, is_shared: bool = False) -> None:
        storages = [tensor.untyped_storage() for tensor in cache.tensors()]
        self._uncount(node)
        node.cache, node.prompt, node.is_shared = cache, prompt, is_shared
        node.held = {each.data_ptr(): each.nbytes() for each in storages if each.nbytes()}
        self.nbytes += sum(nbytes for at, nbytes in node.held.items() if not self._held[at])
        self._held.update(node.held.keys())
        self._touch(node)

    def _drop(self, node: _Node) -> None:
        """Take out rows that a longer text has too."""
        if self._shelf is not None and node.file is not None:
            self._shelf.forget(node.file)
            node.file = None
        self._uncount(node)
        self._tidy(node)

    def _uncount(self, node: _Node) -> None:
        self._held.subtract(node.held.keys())
        for at, nbytes in node.held.items():
            if not self._held[at]:
                del self._held[at]
                self.nbytes -= nbytes
        node.cache, node.held = None, {}

    def _tidy(self, node: _Node) -> None:
        """Take out a node that has nothing, and those before it."""
        while node.parent is not None and node.cache is None and node.file is None and len(node.children) < 2:
            parent, first = node.parent, node.tokens[0]
            del parent.children[first]
            for child in node.children.values():
                child.parent, child.tokens = parent, node.tokens + child.tokens
                parent.children[first] = child
            node = parent

    def _at(self, root: _Node, tokens: list[int]) -> _Node:
        """The node of exactly these tokens, made where there is none."""
        node, depth = root, 0
        while depth < len(tokens):
            child = node.children.get(tokens[depth])
            if child is None:
                child = node.children[tokens[depth]] = _Node(node, tokens[depth:], len(tokens))
            elif (same := common(child.tokens, tokens[depth:])) < len(child.tokens):
                between = node.children[tokens[depth]] = _Node(node, child.tokens[:same], depth + same, used=child.used)
                child.parent, child.tokens = between, child.tokens[same:]
                between.children[child.tokens[0]] = child
                child = between
            node, depth = child, child.depth
        return node


def _find(root: _Node, tokens: Sequence[int]) -> tuple[_Node, int]:
    """The first node that has all that the tree has of these tokens, and how many these are."""
    node, depth = root, 0
    while depth < len(tokens) and (child := node.children.get(tokens[depth])) is not None:
        node, same = child, common(child.tokens, tokens[depth : depth + len(child.tokens)])
        depth += same
        if same < len(child.tokens):
            break
    return node, depth


def _goes_on(source: _Node, length: int) -> bool:
    """Whether who has so many of its tokens goes on behind its prompt."""
    return not source.children and length >= source.prompt - _REOPENED


def _newest(node: _Node) -> _Node | None:
    """Who has rows at this node or behind it: the node itself, or what was used last; in memory, or else in a file."""
    if node.cache is not None:
        return node
    have = [each for each in node if each.cache is not None or each.file is not None]
    return max(have, key=lambda each: (each.cache is not None, each.used), default=None)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix."""
    at, most = 0, min(len(one), len(other))
    while at < most and one[at : at + BLOCK] == other[at : at + BLOCK]:
        at += BLOCK
    rest = zip(one[at : at + BLOCK], other[at : at + BLOCK], strict=False)
    return next((at + i for i, (a, b) in enumerate(rest) if a != b), min(at + BLOCK, most) if at < most else most)
