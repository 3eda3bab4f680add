"""When two steps that continue one text mean the same: what stands in for SemanticSpec's clusters of meaning.

The paper (2602.03708) clusters twenty continuations by two-way entailment, with a model of 900 M parameters. Here two
steps mean the same if they come to the same number out of the same ones, and where neither holds a number, if the
target's own states over them point the same way. So a sum that is put otherwise is the same step, and one with
another result isn't; what a step of words alone says is judged more roughly than by entailment.
"""

from __future__ import annotations

import re

from torch import Tensor
from torch.nn.functional import cosine_similarity

__all__ = ["ALIKE", "numbers", "same"]

ALIKE = 0.9
"""Least cosine between the states of steps without numbers, less the mean over all steps."""

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def numbers(text: str) -> list[float]:
    """A step's numbers, in order. A comma within one parts thousands."""
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]


def same(one: str, other: str, states: tuple[Tensor, Tensor]) -> bool:
    """Whether two steps mean the same: their last numbers agree, and the numbers of one are among the other's.

    states: of each, the target's mean hidden state [width] over it, less the mean over all steps.
    """
    first, second = numbers(one), numbers(other)
    if not first and not second:
        return bool(cosine_similarity(*states, dim=-1) >= ALIKE)
    if not first or not second or first[-1] != second[-1]:
        return False
    return set(first) <= set(second) or set(second) <= set(first)
