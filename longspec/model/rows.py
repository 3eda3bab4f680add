"""The token positions of a forward pass, flattened over sequences, what its layers share, and which it leaves out.

Takes each sequence's stage and tokens; knows no layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspec.attention.native_batch import Texts
from longspec.cache.stage import Stage
from longspec.model.config import Rope

__all__ = ["NO_SKIP", "Chunk", "Pass", "Rows", "Skip", "Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """The token positions of one sequence in a pass."""

    stage: Stage
    staged: slice  # their indices in the stage
    at: slice  # their indices in the pass
    shift: int = 0  # the pass's layer i is their layer i + shift: they are whole loops of a looped model ahead


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of a pass."""

    stage: Stage
    staged: slice  # the positions' indices in the stage
    tokens: Sequence[int]
    length: int  # committed rows before the stage
    long: bool  # planned beyond a longrope model's original context
    shift: int = 0  # as a span's


@dataclass(frozen=True, slots=True)
class Rows:
    """The token positions of one forward pass, sequence by sequence."""

    tokens: Tensor  # [r] int64
    positions: Tensor  # [r] int64
    long: Tensor  # [r] bool: of a sequence that is planned beyond a longrope model's original context
    spans: Sequence[Span]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], device: torch.device) -> Rows:
        """Concatenate the positions of all chunks."""
        tokens: list[int] = []
        positions: list[int] = []
        long: list[bool] = []
        spans = []
        for chunk in chunks:
            start = len(tokens)
            tokens += chunk.tokens
            positions += [chunk.length + depth for depth in chunk.stage.depths[chunk.staged]]
            long += [chunk.long] * len(chunk.tokens)
            spans.append(Span(chunk.stage, chunk.staged, slice(start, len(tokens)), chunk.shift))
        numbers = torch.tensor([tokens, positions, long], device=device)  # one copy to the device
        return cls(numbers[0], numbers[1], numbers[2].bool(), spans)

    def part(self, staged: Sequence[slice]) -> tuple[Rows, list[int]]:
        """Some of each span's rows alone, named by their indices in its stage, and where those stand in this pass. A
        span of which none is named is left out.
        """
        at: list[int] = []
        spans = []
        for span, some in zip(self.spans, staged, strict=True):
            if some.start < some.stop:
                first, shift = len(at), span.at.start - span.staged.start
                at += range(some.start + shift, some.stop + shift)
                spans.append(Span(span.stage, some, slice(first, len(at)), span.shift))
        return replace(self, tokens=self.tokens[at], positions=self.positions[at], long=self.long[at], spans=spans), at


@dataclass(frozen=True, slots=True)
class Pass:
    """What the layers of one pass share."""

    rows: Rows
    turns: Mapping[Rope, tuple[Tensor, Tensor]]  # cosines and signed sines [r, 1, dims] of each kind of rope
    texts: Texts | None  # the spans that the batched attention kernel takes; None where it takes none
    attend: Callable[..., Tensor]  # of `longspec.attention`, for the others
    inputs: Tensor | None = None  # [r, layers, p]: each layer's own embeddings of the tokens (Gemma 4)

    @property
    def by_kernel(self) -> bool:
        """Whether the batched attention kernel takes all spans."""
        return self.texts is not None and len(self.texts) == len(self.rows.spans)


@dataclass(frozen=True, slots=True)
class Skip:
    """Sub-layers that a pass leaves out: only the residual stream passes them."""

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.attention) + len(self.mlp)


NO_SKIP = Skip()
