"""One session's grammar matcher: the allowed and the forced next tokens.

Takes tokens and paths of draft tokens after the committed sequence; gives masked logits, and pruned and extended
drafts. Knows no model and no drafter. The mask after a path depends on its tokens alone, so the output is the same
whatever is drafted: pruning and extending a draft changes how many tokens are kept, nothing else.
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

from longspec.constraints.grammar import LIMITS, too_large
from longspec.errors import UsageError
from longspec.text.tokenizer import Vocabulary
from longspec.types import Draft

__all__ = ["Constraint", "joined"]

_TOKENIZERS: WeakKeyDictionary[Vocabulary, LLTokenizer] = WeakKeyDictionary()
"""A vocabulary's trie: 49,152 tokens take 0.17 seconds, a grammar over them about a millisecond."""


class Constraint:
    """A matcher for a grammar of `grammar_of`, over a vocabulary of `size` logits."""

    def __init__(self, grammar: str, vocabulary: Vocabulary, size: int, end_tokens: Sequence[int]) -> None:
        tokenizer = _TOKENIZERS.get(vocabulary)
        if tokenizer is None:
            _TOKENIZERS[vocabulary] = tokenizer = _tokenizer(vocabulary, size, end_tokens)
        self._fresh: Callable[[], LLMatcher] = partial(LLMatcher, tokenizer, grammar, log_level=0, limits=LIMITS)
        self._matcher = self._fresh()
        self._taken: list[int] = []
        self._broken: dict[tuple[int, ...], UsageError] = {}  # tokens after which the matcher gives up, and why
        self._failed = False  # whether a matcher of this text has had an error
        self._end_tokens = list(end_tokens)
        self._size = size
        if self._matcher.is_error():
            raise UsageError(f"The grammar can't be used with this model: {self._matcher.get_error().splitlines()[0]}")

    def take(self, token: int) -> bool:
        """Append a token to the sequence; returns whether the grammar ends with it.

        Raises:
            UsageError: the matcher stops here, although the grammar doesn't accept what is written.
        """
        self._taken.append(token)
        took, matcher = bool(self._matcher.try_consume_tokens([token])), self._matcher
        if (not took or matcher.is_error()) and not (took := self._renew([])) and matcher.is_error():
            raise _stopped(matcher)
        matcher = self._matcher
        if not took:
            raise self._stuck(len(self._taken) - 1)
        if matcher.is_stopped() and not matcher.is_accepting():
            raise UsageError(
                f"The answer ends before its grammar accepts it: the matcher stopped ({matcher.stop_reason()}) at its "
                f"token {len(self._taken):,}; make the grammar simpler."
            )
        return matcher.is_stopped()

    def end(self) -> None:
        """The model has chosen an end of text. Raises UsageError where the grammar doesn't accept what is written:
        `mask` leaves an end alone where no token of the vocabulary leads on.
        """
        if not self._matcher.is_accepting():
            raise self._stuck(len(self._taken))

    def _stuck(self, count: int) -> UsageError:
        return UsageError(
            f"The answer can't be held to its grammar any longer: after {count:,} tokens this model's vocabulary has "
            "none that leads on; take a grammar whose letters the model can write."
        )

    @property
    def broken(self) -> UsageError | None:
        """Why nothing can be said of what follows the sequence: its mask was none. To be asked before `take`."""
        return self._broken.get(tuple(self._taken)) if self._broken else None

    def mask(self, logits: Tensor, paths: Sequence[Sequence[int]], vocabulary: Tensor | None = None) -> Tensor:
        """Logits [r, V] with -inf for the tokens not allowed after the sequence and each of r paths.

        A path that is itself forbidden stays unmasked: it is never reached. vocabulary: the tokens [V] of the logits,
        if they aren't the whole vocabulary; a row without an allowed token stays unmasked too.
        """
        allowed = np.ones((len(paths), self._size), dtype=np.uint8)
        for row, path, good in zip(allowed, paths, self._along(paths), strict=True):
            if good:
                row[:] = np.unpackbits(self._bits(path), count=len(row), bitorder="little")
                if not row.any():  # the grammar continues, but no token does: an end, which `end` calls an error
                    row[self._end_tokens] = 1
        if vocabulary is not None:
            allowed = allowed[:, vocabulary.cpu().numpy()]
            allowed[~allowed.any(1)] = 1
        return logits.masked_fill(torch.from_numpy(allowed == 0).to(logits.device), float("-inf"))

    def forced(self, limit: int) -> list[int]:
        """The tokens that the grammar forces next, at most `limit`."""
        return self._matcher.compute_ff_tokens()[:limit] if limit > 0 else []

    def prune(self, draft: Draft, ahead: Sequence[int]) -> Draft:
        """The draft without the nodes that the grammar forbids after the tokens `ahead`.

        A draft that is `whole` isn't cut.
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
        """The tokens `ahead`, the draft after them, and the tokens forced after its first path: at most `limit`
        tokens.
        """
        return joined(draft, ahead, limit, self.behind)

    def behind(self, path: Sequence[int], limit: int) -> list[int]:
        """The tokens forced after the sequence and this path, at most `limit`; none after a forbidden path."""
        tokens: list[int] = []
        for good in self._along([path]):  # leaving the loop resets the matcher
            tokens = self.forced(limit) if good else []
        return tokens

    def _along(self, paths: Sequence[Sequence[int]]) -> Iterator[bool]:
        """For each path, whether it is allowed, with the matcher at its end; afterwards the matcher is back at the
        sequence's end.
        """
        at: list[int] = []
        for path in paths:
            same = next((i for i, (a, b) in enumerate(zip(at, path, strict=False)) if a != b), min(len(at), len(path)))
            if same < len(at):
                self._back(len(at) - same, at[:same])
                del at[same:]
            at += path[same : same + self._matcher.try_consume_tokens(list(path[same:]))]
            if self._matcher.is_error():
                at = list(path)
                if not self._renew(path):  # the text's own error is told where it takes that token
                    self._renew(at := [])
            yield len(at) == len(path)
        if at:
            self._back(len(at), [])

    def _back(self, count: int, path: Sequence[int]) -> None:
        """Take back the last tokens of a path. A matcher that was near its limits forgets where it was."""
        if self._failed:
            self._renew(path)
        else:
            self._matcher.rollback(count)

    def _bits(self, path: Sequence[int]) -> NDArray[np.uint8]:
        """The bit mask of allowed tokens after the path, at whose end the matcher is."""
        matcher = self._matcher
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if not matcher.is_error():
            return bits
        self._renew(path)
        if matcher.get_error().startswith("NoExtension"):
            return np.zeros_like(bits)
        again = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if not self._matcher.is_error():
            return again
        self._renew(path)
        self._broken[(*self._taken, *path)] = _stopped(matcher)
        return np.full_like(bits, 255)  # where the text gets there, `broken` has the error

    def _renew(self, path: Sequence[int]) -> bool:
        """A fresh matcher at the path's end; whether it gets there. An error is permanent for a matcher, and may have
        come from drafts, whose paths count toward its limits.
        """
        self._failed = True
        self._matcher = self._fresh()
        tokens = [*self._taken, *path]
        return self._matcher.try_consume_tokens(tokens) == len(tokens) and not self._matcher.is_error()


def _stopped(matcher: LLMatcher) -> UsageError:
    """What to raise where the matcher has an error, most often a limit of the library's."""
    return UsageError(
        f"The answer can't be held to its grammar any longer: the grammar is {too_large(matcher.get_error())}."
    )


def joined(
    draft: Draft, ahead: Sequence[int], limit: int, behind: Callable[[Sequence[int], int], Sequence[int]]
) -> Draft:
    """The tokens `ahead`, the draft after them, and the tokens forced after its first path: at most `limit` tokens."""
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
    """A vocabulary in llguidance's interface: each token's bytes, and the tokenization of a string."""

    def __init__(self, vocabulary: Vocabulary, size: int, end_tokens: Sequence[int]) -> None:
        pieces = [vocabulary.piece(token, first=False) for token in range(size)]
        self.tokens = [piece or b"" for piece in pieces] + [b""]  # a last end token for vocabularies without one
        self.special_token_ids = [token for token, piece in enumerate(pieces) if piece is None] + [size]
        self.eos_token_id = end_tokens[0] if end_tokens else size
        self.bos_token_id = None
        self._cut = vocabulary.tokenizer  # not the vocabulary, which the trie cache must not keep alive
        self._by_piece = {piece: token for token, piece in enumerate(self.tokens) if piece}
        self._longest = max(map(len, self._by_piece), default=0)

    def __call__(self, data: bytes) -> list[int]:
        tokens: list[int] = self._cut.encode(data.decode(errors="replace"), add_special_tokens=False).ids
        if b"".join(self.tokens[token] for token in tokens) == data:
            return tokens
        # A tokenizer that prepends a space to every text: greedy longest match instead, as far as there is one.
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
