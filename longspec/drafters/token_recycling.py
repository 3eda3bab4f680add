"""Token Recycling (Luo et al., 2408.08696): drafts the tokens that the target last ranked highest after each token.

Training-free. Verification gives the target's top-K tokens at each position of the forward pass, rejected draft tokens
included. A table of the vocabulary's size keeps the last top K of each token, shared by all sequences. A draft is a
tree through this table, most probable paths first; a rank's probability is the running frequency with which that
candidate was the next token. With an inner drafter (`recycle+ngram`) the tree merges the inner draft's nodes in.

Takes committed tokens and verdicts with `successors`; gives trees.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any

from longspec.types import Commit, Draft, Drafter, Needs, Verdict, Writing

__all__ = ["Recycle"]

SUCCESSORS = 8
"""K, candidates of a token in the table."""

_FLOOR = 0.01  # least probability of a drafted path
_RECENT = 1 / 500  # least update rate of a rank's probability, per token
_PRIOR = 50  # tokens that the prior probabilities 1/2, 1/4, 1/8, ... of the ranks count for


class Recycle(Drafter):
    """vocabulary: V, its size. inner: a drafter whose draft is merged in."""

    needs = Needs(successors=SUCCESSORS)
    takes_inner = True

    def __init__(self, vocabulary: int, inner: Drafter | None = None) -> None:
        self.inner = inner
        self._table = array("i", [-1]) * (vocabulary * SUCCESSORS)  # [V, K], most probable first; -1: empty
        self._ranks = [0.5 ** (rank + 1) for rank in range(SUCCESSORS)]
        self._counted = _PRIOR

    @classmethod
    def make(cls, model: Any, inner: Drafter | None = None) -> Drafter:
        return cls(model.decoder.config.vocabulary, inner)

    @classmethod
    def planned_bytes(cls, target: Any) -> tuple[int, int]:
        return 4 * SUCCESSORS * target.config.vocabulary, 0

    @property
    def nbytes(self) -> int:
        return self._table.itemsize * len(self._table)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        guesses = ahead or [()] * len(sessions)
        bets: Sequence[Draft | None] = [None] * len(sessions)
        if self.inner is not None:
            bets = self.inner.propose(sessions, limits, ahead)
        return [
            self._tree((*session.tokens[-1:], *guess)[-1], limit, bet)
            for session, limit, guess, bet in zip(sessions, limits, guesses, bets, strict=True)
        ]

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        super().observe(session, commit, verdict)
        if verdict.successors:
            self._count([session.tokens[-len(commit.tokens) - 1], *commit.tokens])
            for token, likely in verdict.successors:
                at = token * SUCCESSORS
                self._table[at : at + len(likely)] = array("i", likely)

    def _count(self, text: Sequence[int]) -> None:
        """Update the ranks' probabilities: which rank each token had in the table entry of the token before it."""
        for i, token in enumerate(text[:-1]):
            likely = self._after(token)
            if likely:
                self._counted += 1
                rate = max(_RECENT, 1 / self._counted)
                self._ranks = [
                    chance + rate * ((other == text[i + 1]) - chance)
                    for chance, other in zip(self._ranks, likely, strict=True)
                ]

    def _after(self, token: int) -> array[int]:
        at = token * SUCCESSORS
        return self._table[at : at + SUCCESSORS] if self._table[at] >= 0 else array("i")

    def _tree(self, last: int, limit: int, bet: Draft | None) -> Draft:
        """The most probable nodes of the table's tree and the inner draft, best first (as in EAGLE-2, 2406.16858)."""
        children, probs = _children(bet)
        tokens: list[int] = []
        parents: list[int] = []
        paths: list[float] = []
        # A heap: -path probability, order, token, parent, node of the inner draft (-1 its root, -2 none).
        leaves: list[tuple[float, int, int, int, int]] = []
        order = count()
        chance, token, node, inner = 1.0, last, -1, -1
        while len(tokens) < limit:
            own = dict(zip(self._after(token), self._ranks, strict=False))
            left, whole = 1.0, probs[inner] if inner >= 0 else 1.0
            for other, at in children.get(inner, {}).items() if inner >= -1 else ():
                share = probs[at] / whole if whole > 0 else 0.0
                left -= share
                heappush(leaves, (-chance * max(share, own.pop(other, 0.0)), next(order), other, node, at))
            for other, share in own.items():
                if (path := chance * share * left) >= _FLOOR:
                    heappush(leaves, (-path, next(order), other, node, -2))
            if not leaves:
                break
            loss, _, token, parent, inner = heappop(leaves)
            chance, node = -loss, len(tokens)
            tokens.append(token)
            parents.append(parent)
            paths.append(chance)
        return Draft.tree(tokens, parents, paths)


def _children(bet: Draft | None) -> tuple[dict[int, dict[int, int]], list[float]]:
    """Children of each node of a draft (-1: the root), as token to node; and the path probability of each node."""
    children: dict[int, dict[int, int]] = {}
    if bet is None:
        return children, []
    for node, (token, parent) in enumerate(zip(bet.tokens.tolist(), bet.parents.tolist(), strict=True)):
        children.setdefault(parent, {})[token] = node
    return children, [1.0] * len(bet) if bet.probs is None else bet.probs.tolist()
