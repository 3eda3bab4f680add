"""A trained `AllDepths` head as a drafter: one call gives its outputs at all depths, which the tree multiplies out.

Takes a loaded target and a `Trained` head. All nodes of one depth have the same candidates; `grow` chooses the paths by
their probability. The only state of a session is what the head reads of its newest position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspec.cache.tree import Tree
from longspec.drafters.common.tree_growth import grow
from longspec.heads.format import Trained, load_head, room
from longspec.model.decoder import Rows
from longspec.model.load import Model
from longspec.types import Draft, Drafter, Needs, Writing

__all__ = ["AtOnce"]


@dataclass(slots=True)
class _Growth:
    """One session's draft tree, and the head's logits [depth, D], whatever the tree."""

    logits: Tensor
    tree: Tree = field(default_factory=Tree)

    def add(self, parents: Sequence[int]) -> slice:
        return self.tree.add(parents)

    @property
    def depths(self) -> Sequence[int]:
        return self.tree.depths


class AtOnce(Drafter):
    """Drafts with such a head; an empty draft where the newest position's hidden states aren't known."""

    breadth: int | None = None
    """Candidates of a node; None is the tree's own choice."""

    def __init__(self, model: Model, head: Trained) -> None:
        self.head, self.decoder = head, model.decoder
        self._module: Any = head.module.to(model.decoder.dtype)  # AllDepths, or what a subclass drafts with
        self._rows = head.rows(model)
        self._places = None if head.tokens is None else head.tokens.to(model.decoder.device)
        self.needs = Needs(layers=head.reads(model))
        self._logits: dict[Writing, Tensor] = {}  # [depth, D], of the sessions that are being drafted for
        # By session: committed length, and the states [reads * W] of the last committed position.
        self._newest: WeakKeyDictionary[Writing, tuple[int, Tensor]] = WeakKeyDictionary()

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = "") -> Drafter:
        return cls(model, load_head(folder, model))

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        return room(Path(folder), target.config)[0], 0

    @property
    def nbytes(self) -> int:
        own: int = sum(value.nbytes for value in self._module.state_dict().values())
        return own + (0 if self._places is None else self._rows.nbytes)

    def begin(self, session: Writing) -> None:
        self._newest.pop(session, None)

    def read(self, session: Writing, features: Sequence[Tensor]) -> None:
        self._newest[session] = session.cache.length, torch.cat([each[-1] for each in features])

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        guesses = ahead or [()] * len(sessions)
        fits = [limit if len(guess) < self.head.depth else 0 for limit, guess in zip(limits, guesses, strict=True)]
        rooms = self.rooms(sessions, fits)
        drafting = [session for session, room in zip(sessions, rooms, strict=True) if room]
        self._logits = dict(zip(drafting, self.run(drafting), strict=True)) if drafting else {}
        depth = max(1, self.head.depth - max((len(guess) for guess in guesses), default=0))
        places = self._places
        return grow(self, sessions, rooms, ahead, depth=depth, vocabulary=places, of_head=True, breadth=self.breadth)

    def rooms(self, sessions: Sequence[Writing], limits: Sequence[int]) -> list[int]:
        """The sessions' limits, 0 where the newest position's hidden states aren't known."""
        known = [self._newest.get(session, (-1, None))[0] == len(session.tokens) - 1 for session in sessions]
        return [limit if knows else 0 for limit, knows in zip(limits, known, strict=True)]

    def run(self, sessions: Sequence[Writing]) -> Tensor:
        """Logits [B, depth, D] behind these sessions' newest positions, in one call."""
        made: Tensor = self._module.norm(self._outputs(sessions))
        return made @ self._rows.T

    def _outputs(self, sessions: Sequence[Writing]) -> Tensor:
        """[s, depth, W], before the head's norm."""
        features = torch.stack([self._newest[session][1] for session in sessions])
        last = torch.tensor([session.tokens[-1] for session in sessions], device=features.device)
        made: Tensor = self._module.all_depths(features, self.decoder.embed(last))
        return made

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        return _Growth(self._logits[session]), len(session.tokens) - 1, session.tokens[-1:]

    def forward(self, rows: Rows) -> Tensor:
        """Logits [r, D] rather than hidden states: they depend on a node's depth alone."""
        growths: list[Any] = [span.stage for span in rows.spans]
        return torch.cat(
            [growth.logits[growth.depths[span.staged]] for growth, span in zip(growths, rows.spans, strict=True)]
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The argument: `forward` gives logits already."""
        return hidden

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass
