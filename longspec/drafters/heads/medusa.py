"""Medusa heads as a drafter (2401.10774): each predicts the token at one depth, independent of the tokens before it.

Takes a loaded target and `Medusa` heads. All nodes of one depth have the same candidates; `grow` chooses the paths by
their probability. The only state of a session is its newest hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.cache.tree import Tree
from longspec.drafters.common.tree_growth import grow
from longspec.heads.format import read_config, weights_bytes
from longspec.heads.medusa import Medusa as Heads
from longspec.heads.medusa import load_medusa
from longspec.model.decoder import Rows
from longspec.model.load import Model
from longspec.types import Draft, Drafter, Needs, Writing

__all__ = ["Medusa"]


@dataclass(slots=True)
class _Growth:
    """One session's draft tree, and the logits [V] of each depth reached so far."""

    root: Tensor  # [1, width], normed
    tree: Tree = field(default_factory=Tree)
    logits: dict[int, Tensor] = field(default_factory=dict)

    def add(self, parents: Sequence[int]) -> slice:
        return self.tree.add(parents)

    @property
    def depths(self) -> Sequence[int]:
        return self.tree.depths


class Medusa(Drafter):
    """Drafts with Medusa heads."""

    def __init__(self, model: Model, heads: Heads) -> None:
        self.heads, self.decoder = heads, model.decoder
        self.needs = Needs(layers=(model.decoder.config.layers,))
        # By session: committed length, and the hidden state [1, width] of the last committed position.
        self._newest: WeakKeyDictionary[Writing, tuple[int, Tensor]] = WeakKeyDictionary()

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = "") -> Drafter:
        return cls(model, load_medusa(Path(folder), read_config(folder), model))

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        return weights_bytes(folder, target.dtype), 0

    def begin(self, session: Writing) -> None:
        self._newest.pop(session, None)

    @property
    def nbytes(self) -> int:
        return self.heads.nbytes

    def read(self, session: Writing, features: Sequence[Tensor]) -> None:
        self._newest[session] = session.cache.length, features[0][-1:]

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        known = [self._newest.get(session, (-1, None))[0] == len(session.tokens) - 1 for session in sessions]
        guesses = ahead or [()] * len(sessions)
        fits = [knows and len(guess) < self.heads.depth for knows, guess in zip(known, guesses, strict=True)]
        rooms = [limit if fit else 0 for limit, fit in zip(limits, fits, strict=True)]
        longest = max((len(guess) for guess in guesses), default=0)
        return grow(self, sessions, rooms, ahead, depth=max(1, self.heads.depth - longest), of_head=True)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        hidden = self.decoder.normed(self._newest[session][1])
        return _Growth(hidden), len(session.tokens) - 1, session.tokens[-1:]

    def forward(self, rows: Rows) -> Tensor:
        """Logits [r, V] rather than hidden states: they depend on a node's depth only."""
        made = []
        for span in rows.spans:
            growth: Any = span.stage
            for depth in growth.depths[span.staged]:
                if depth not in growth.logits:
                    written = self.heads.written[depth]
                    hidden = self.heads.run(depth, growth.root)
                    growth.logits[depth] = F.linear(hidden, self.decoder.head if written is None else written)[0]
                made.append(growth.logits[depth])
        return torch.stack(made)

    def logits(self, hidden: Tensor) -> Tensor:
        """The argument: `forward` gives logits already."""
        return hidden

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass
