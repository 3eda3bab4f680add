"""Draft trees of a head whose layer is fed with its own output for the parent: EAGLE-3 and multi-token prediction.

Takes the head's KV cache and a function that runs its layer; gives the layer's outputs, row by row along each path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longspec.cache.tree import Tree
from longspec.model.decoder import Rows, Span

__all__ = ["Growth", "outputs"]


@dataclass(slots=True)
class Growth:
    """One session's draft tree. Its first row is the newest committed one, which is in the head's cache already."""

    stage: Any
    states: list[Tensor]  # [width] each: the layer's output, by row
    tree: Tree = field(default_factory=Tree)

    def add(self, parents: Sequence[int]) -> slice:
        inner = [parent - 1 for parent in (parents if len(self.tree) else parents[1:])]
        if inner:
            self.stage.add(inner)
        return self.tree.add(parents)

    @property
    def depths(self) -> Sequence[int]:
        return self.tree.depths


def outputs(rows: Rows, run: Callable[[Rows, Tensor], Tensor]) -> Tensor:
    """The layer's outputs [r, width]: the sessions' first rows in one batch, then their second ones, and so on.

    run: the layer, of rows and their parents' outputs [n, width].
    """
    growths: list[Any] = [span.stage for span in rows.spans]
    made: Tensor = growths[0].states[0].new_empty(len(rows.tokens), len(growths[0].states[0]))
    for step in range(max(span.staged.stop - span.staged.start for span in rows.spans)):
        places = [span.staged.start + step for span in rows.spans]
        for span, growth, place in zip(rows.spans, growths, places, strict=True):
            if place == 0:
                made[span.at.start] = growth.states[0]
        chosen = [
            slice(place, place + (0 < place < span.staged.stop)) for span, place in zip(rows.spans, places, strict=True)
        ]
        part, at = rows.part(chosen)
        if not at:
            continue
        grown: list[Any] = [span.stage for span in part.spans]
        before = [
            growth.states[growth.tree.parents[span.staged.start]]
            for growth, span in zip(grown, part.spans, strict=True)
        ]
        spans = [
            Span(growth.stage, slice(span.staged.start - 1, span.staged.stop - 1), span.at)
            for growth, span in zip(grown, part.spans, strict=True)
        ]
        made[at] = run(replace(part, spans=spans), torch.stack(before))
        for growth, state in zip(grown, made[at], strict=True):
            growth.states.append(state)
    return made
