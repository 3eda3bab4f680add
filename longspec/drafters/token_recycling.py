"""Bets that what follows a token is what the target last found likely after it.

Token Recycling (Luo et al., 2408.08696), training-free: a verification gives the target's most likely tokens after each
of its rows, those of rejected drafts too. They are kept, K for each token of the vocabulary, for all texts together. A
draft is a tree through this table, the likeliest paths first; a rank's chance is how often the text went on with it.
Over another drafter (`recycle+ngram`) the tree begins with the other's bets, and fills what the limit leaves.

Takes committed tokens and verdicts with `successors`; gives trees. A node costs about 5 microseconds.
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
"""K: 16 kept 0.1% more tokens of the default model's answers to Spec-Bench."""

_FLOOR = 0.01  # a path that is less probable isn't drafted
_RECENT = 1 / 500  # of the text's steps, in the chance of a rank
_PRIOR = 50  # steps that the first probs count for: halves of what is left, half of them all


class Recycle(Drafter):
    """vocabulary: V. inner: whose bets come first."""

    needs = Needs(successors=SUCCESSORS)
    takes_inner = True

    def __init__(self, vocabulary: int, inner: Drafter | None = None) -> None:
        self.inner = inner
        self._table = array("i", [-1]) * (vocabulary * SUCCESSORS)  # the likeliest token first; -1: nothing is known
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
        """Which rank each of these tokens had after the one before it."""
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
        """The likeliest nodes of the table's tree and the other's, best first (EAGLE-2's growth, 2406.16858)."""
        children, probs = _children(bet)
        tokens: list[int] = []
        parents: list[int] = []
        paths: list[float] = []
        leaves: list[tuple[float, int, int, int, int]] = []  # a heap: -chance, order, token, parent, node of the bet
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
    """By node, -1 for the text: the tokens that continue it and their nodes. And the probs of all paths."""
    children: dict[int, dict[int, int]] = {}
    if bet is None:
        return children, []
    for node, (token, parent) in enumerate(zip(bet.tokens.tolist(), bet.parents.tolist(), strict=True)):
        children.setdefault(parent, {})[token] = node
    return children, [1.0] * len(bet) if bet.probs is None else bet.probs.tolist()
