"""Who is kept, and what follows: one walk for greedy and sampled, chain and tree.

The target's choice after every row is fixed before anybody drafts (`longspec.sampling.sampler`). So verifying needs no
probabilities: start at the text, step to the child that equals the choice, stop where none does; that choice is
the bonus token. What is written is the target's own choices, one after another, whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspec.types import Verdict

__all__ = ["verify"]


def verify(tokens: Sequence[int], parents: Sequence[int], choices: Sequence[int]) -> Verdict:
    """The verdict on a draft of n tokens, by n + 1 choices: the text's own, then one after each draft token."""
    children: dict[tuple[int, int], int] = {}
    for child, place in enumerate(zip(parents, tokens, strict=True)):
        children.setdefault(place, child)
    kept: list[int] = []
    at = -1
    while (child := children.get((at, choices[at + 1]))) is not None:  # type: ignore[assignment]
        kept.append(child)
        at = child
    return Verdict(tuple(kept), choices[at + 1], tuple(choices))
