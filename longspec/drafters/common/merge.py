"""Merging of two drafts: the most probable nodes of both trees, as in `ngram+clover2`.

A lookup drafter and a head are right at different positions, so that together they bring more tokens per step than
either (docs/benchmarks/drafters_fixed.json: 15 tokens in every draft).

Takes drafters that give each node's path probability; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspec.types import Draft, Drafter, Writing

__all__ = ["Merged", "laid_over", "merged"]


class Merged(Drafter):
    """Merges the drafts of two drafters, each made for the whole limit."""

    def __init__(self, outer: Drafter, inner: Drafter) -> None:
        self.outer: Drafter = outer
        self.inner: Drafter = inner

    @property
    def parts(self) -> Sequence[Drafter]:
        return self.outer, self.inner

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        both = (drafter.propose(sessions, limits, ahead) for drafter in (self.outer, self.inner))
        return [laid_over(one, other, limit) for one, other, limit in zip(*both, limits, strict=True)]


def merged(outer: Drafter, inner: Drafter | None) -> Drafter:
    """`outer` merged with `inner`; `outer` alone without one."""
    return outer if inner is None else Merged(outer, inner)


def laid_over(one: Draft, other: Draft, limit: int) -> Draft:
    """The `limit` most probable nodes of the union of two trees; a shared node has the higher of both probabilities.

    Probabilities don't rise along a path of either tree, nor of the union: so a node's parent always precedes it.
    """
    if not len(one) or not len(other):
        return one if len(one) else other
    nodes: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    probs: list[float] = []
    for tree in (one, other):
        places = [-1]
        sure = [1.0] * len(tree) if tree.probs is None else tree.probs.tolist()
        for token, parent, chance in zip(tree.tokens.tolist(), tree.parents.tolist(), sure, strict=True):
            at = places[parent + 1]
            node = nodes.setdefault((at, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(at)
                probs.append(chance)
            else:
                probs[node] = max(probs[node], chance)
            places.append(node)
    kept = sorted(range(len(tokens)), key=lambda node: (-probs[node], node))[:limit]
    new = {-1: -1, **{node: i for i, node in enumerate(kept)}}
    return Draft.tree([tokens[i] for i in kept], [new[parents[i]] for i in kept], [probs[i] for i in kept])
