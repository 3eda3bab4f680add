"""One session's grammar, standing at the end of its text: what may follow, and what must.

Takes tokens and paths of draft tokens behind the text; gives logits without what the grammar forbids, and drafts
without what it would cut. Knows no model and no drafter. What a path may go on with depends on its tokens alone, so a
text is the same whatever is drafted: pruning a draft and adding to it changes how many rows are kept, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray
from torch import Tensor

from longspec.constraints.grammar import LIMITS
from longspec.errors import LongspecError, UsageError
from longspec.text.tokenizer import Vocabulary
from longspec.types import Draft

__all__ = ["Constraint", "joined"]

_TOKENIZERS: WeakKeyDictionary[Vocabulary, LLTokenizer] = WeakKeyDictionary()
"""A vocabulary's trie: 49,152 tokens take 0.17 seconds, a grammar over them about a millisecond."""


class Constraint:
    """A grammar of `grammar_of`, over the tokens of a model with `size` logits."""

    def __init__(self, grammar: str, vocabulary: Vocabulary, size: int, end_tokens: Sequence[int]) -> None:
        tokenizer = _TOKENIZERS.get(vocabulary)
        if tokenizer is None:
            _TOKENIZERS[vocabulary] = tokenizer = _tokenizer(vocabulary, size, end_tokens)
        self._fresh: Callable[[], LLMatcher] = partial(LLMatcher, tokenizer, grammar, log_level=0, limits=LIMITS)
        self._matcher = self._fresh()
        self._taken: list[int] = []
        self._end_tokens = list(end_tokens)
        self._size = size
        if self._matcher.is_error():
            raise UsageError(f"The grammar can't be used with this model: {self._matcher.get_error().splitlines()[0]}")

    def take(self, token: int) -> bool:
        """The text has one more token: whether the grammar can't go on behind it."""
        self._taken.append(token)
        return not self._matcher.try_consume_tokens([token]) or self._matcher.is_stopped()

    def mask(self, logits: Tensor, paths: Sequence[Sequence[int]], vocabulary: Tensor | None = None) -> Tensor:
        """Logits [r, V] with -inf for what can't follow the text and each of r paths.

        A path that is forbidden itself stays open: nothing gets to its end. vocabulary: the tokens [V] that the logits
        are of, if they aren't of all; a row of which none may follow stays open too.
        """
        allowed = np.ones((len(paths), self._size), dtype=np.uint8)
        for row, path, good in zip(allowed, paths, self._along(paths), strict=True):
            if good:
                row[:] = np.unpackbits(self._bits(path), count=len(row), bitorder="little")
                if not row.any():  # no token leads on, though the grammar does: better an end than any token
                    row[self._end_tokens] = 1
        if vocabulary is not None:
            allowed = allowed[:, vocabulary.cpu().numpy()]
            allowed[~allowed.any(1)] = 1
        return logits.masked_fill(torch.from_numpy(allowed == 0).to(logits.device), float("-inf"))

    def forced(self, limit: int) -> list[int]:
        """The tokens that must come next, at most `limit`."""
        return self._matcher.compute_ff_tokens()[:limit] if limit > 0 else []

    def prune(self, draft: Draft, ahead: Sequence[int]) -> Draft:
        """The draft, made to follow the tokens `ahead`, without nodes that the grammar forbids.

        A draft that is to stay whole stays so.
        """
        if draft.whole:
            return draft
        parents = draft.parents.tolist()
        paths = [list(ahead)]
        for token, parent in zip(draft.tokens.tolist(), parents, strict=True):
            paths.append([*paths[parent + 1], token])
        keep = [node for node, good in enumerate(self._along(paths[1:])) if good]
        if len(keep) == len(parents):
            return draft
        place = {-1: -1} | {node: i for i, node in enumerate(keep)}
        kept = torch.tensor([place[parents[node]] for node in keep], dtype=torch.int64)
        return Draft(draft.tokens[keep], kept, None if draft.probs is None else draft.probs[keep])

    def extend(self, draft: Draft, ahead: Sequence[int], limit: int) -> Draft:
        """The tokens `ahead`, the draft behind them, and what its first path forces: at most `limit` tokens."""
        return joined(draft, ahead, limit, self.behind)

    def behind(self, path: Sequence[int], limit: int) -> list[int]:
        """The tokens that must follow the text and this path, at most `limit`; none behind a forbidden one."""
        tokens: list[int] = []
        for good in self._along([path]):  # whose end sets the matcher back
            tokens = self.forced(limit) if good else []
        return tokens

    def _along(self, paths: Sequence[Sequence[int]]) -> Iterator[bool]:
        """For each path, whether it is allowed, with the matcher at its end; at last back at the text's."""
        at: list[int] = []
        for path in paths:
            same = next((i for i, (a, b) in enumerate(zip(at, path, strict=False)) if a != b), min(len(at), len(path)))
            if same < len(at):
                self._matcher.rollback(len(at) - same)
                del at[same:]
            at += path[same : same + self._matcher.try_consume_tokens(list(path[same:]))]
            yield len(at) == len(path)
        if at:
            self._matcher.rollback(len(at))

    def _bits(self, path: Sequence[int]) -> NDArray[np.uint8]:
        """One for each token that may follow the path, at whose end the matcher stands."""
        matcher = self._matcher
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if not matcher.is_error():
            return bits
        # An error stays with a matcher, and this one may be only in a draft: another one goes on.
        self._matcher = self._fresh()
        self._matcher.try_consume_tokens([*self._taken, *path])
        reason = matcher.get_error().splitlines()[0].rstrip(".")
        if not reason.startswith("NoExtension"):
            raise LongspecError(f"The answer can't be held to its grammar any longer ({reason}); make it simpler.")
        return np.zeros_like(bits)


def joined(
    draft: Draft, ahead: Sequence[int], limit: int, behind: Callable[[Sequence[int], int], Sequence[int]]
) -> Draft:
    """The tokens `ahead`, the draft behind them, and behind its first path what must follow: at most `limit` tokens."""
    first = len(ahead)
    tokens = [*ahead, *draft.tokens.tolist()]
    parents = [*range(-1, first - 1), *(first + parent for parent in draft.parents.tolist())]
    path, at = list(ahead), first - 1
    while (child := next((node for node in range(first, len(parents)) if parents[node] == at), None)) is not None:
        path.append(tokens[child])
        at = child
    for token in behind(path, limit - len(tokens)) if len(draft) else ():
        tokens.append(token)
        parents.append(at)
        at = len(tokens) - 1
    if len(tokens) == len(draft):
        return draft
    longer = Draft.tree(tokens, parents)
    return Draft(longer.tokens, longer.parents, None, draft.begun, draft.whole)


class _Pieces:
    """A vocabulary as llguidance reads one: each token's bytes, and how a text is cut into tokens."""

    def __init__(self, vocabulary: Vocabulary, size: int, end_tokens: Sequence[int]) -> None:
        pieces = [vocabulary.piece(token, first=False) for token in range(size)]
        self.tokens = [piece or b"" for piece in pieces] + [b""]  # the last one ends texts that have no end token
        self.special_token_ids = [token for token, piece in enumerate(pieces) if piece is None] + [size]
        self.eos_token_id = end_tokens[0] if end_tokens else size
        self.bos_token_id = None
        self._cut = vocabulary.tokenizer  # not the vocabulary, which the cache of tries is to let go
        self._by_piece = {piece: token for token, piece in enumerate(self.tokens) if piece}
        self._longest = max(map(len, self._by_piece), default=0)

    def __call__(self, data: bytes) -> list[int]:
        tokens: list[int] = self._cut.encode(data.decode(errors="replace"), add_special_tokens=False).ids
        if b"".join(self.tokens[token] for token in tokens) == data:
            return tokens
        # A tokenizer that puts a space before every text: the longest pieces instead, as far as there are any.
        tokens, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self._by_piece), None)
            if end is None:
                break
            tokens.append(self._by_piece[data[at:end]])
            at = end
        return tokens


def _tokenizer(vocabulary: Vocabulary, size: int, end_tokens: Sequence[int]) -> LLTokenizer:
    pieces = _Pieces(vocabulary, size, end_tokens)
    return LLTokenizer(TokenizerWrapper(pieces), eos_token=list(end_tokens) or [pieces.eos_token_id])
