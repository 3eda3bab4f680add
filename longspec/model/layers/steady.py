"""Elementwise functions whose values don't depend on where an element stands.

torch computes the elements that fill no vector by another exponential than the others: the last bit of a row's value
then depends on the rows beside it. In fp64 both round to the same fp32 value.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["steady"]


def steady(function: Callable[[Tensor], Tensor], x: Tensor, *, strict: bool) -> Tensor:
    """function(x) in fp32; under --strict the same bits wherever a value stands."""
    return function(x.double()).float() if strict else function(x.float())
