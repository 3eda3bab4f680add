"""Verification of a draft: one walk down the tree, for greedy and sampled decoding, chains and trees.

The noise is fixed before drafting (`longspec.sampling.sampler`), so that the target's choice at every position is
deterministic and verification needs no probabilities: start at the root, go to the child that equals the target's
choice, stop where there is none; that choice is the bonus token. The output is the target's own choices, whatever was
drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspec.types import Verdict

__all__ = ["verify"]


def verify(tokens: Sequence[int], parents: Sequence[int], choices: Sequence[int]) -> Verdict:
    """Verify a draft of n tokens.

    parents: index of each token's parent, -1 for the root. choices: n + 1 tokens that the target chooses, after the
    last committed token and after each draft token.
    """
    children: dict[tuple[int, int], int] = {}
    for child, place in enumerate(zip(parents, tokens, strict=True)):
        children.setdefault(place, child)
    kept: list[int] = []
    at = -1
    while (child := children.get((at, choices[at + 1]))) is not None:  # type: ignore[assignment]
        kept.append(child)
        at = child
    return Verdict(tuple(kept), choices[at + 1], tuple(choices))
