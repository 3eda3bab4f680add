"""Multi-token prediction as a drafter: the head that came with the checkpoint (`longspec.heads.published.mtp`).

Takes a loaded target whose files hold such a head. A row is the target's state at a position, after the final norm,
and the token that follows it; for a draft token the state is the head's own for its parent, after the head's norm. For
committed rows but the newest the head only fills its cache: no attention is read, and neither MLP nor output is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspec.drafters.common.feedback import Growth, outputs
from longspec.drafters.common.head_cache import Follow
from longspec.drafters.common.tree_growth import grow
from longspec.heads.draft_vocabulary import hot_tokens
from longspec.heads.published.mtp import Mtp, load_mtp, room
from longspec.model.decoder import Decoder, Rows
from longspec.model.load import Model
from longspec.types import Draft, Drafter, Needs, Writing

__all__ = ["Multitoken"]

_DEPTH = 8
"""Depth limit of a draft. Such heads are trained for the next token or two; the control and the paths' probabilities
stop most drafts earlier.
"""


class Multitoken(Drafter):
    """Drafts with the checkpoint's own head."""

    takes_inner = True
    of_head = False
    """Whether its trees are as broad as those of heads that are trained here."""

    def __init__(self, model: Model, head: Mtp, inner: Drafter | None = None, *, depth: int = _DEPTH) -> None:
        self.head, self.inner, self._target, self._depth = head, inner, model.decoder, depth
        self.needs = Needs(layers=(model.decoder.config.layers,))
        self._follow = Follow(head.decoder.shape, self._run)

    @property
    def decoder(self) -> Decoder:
        return self._target

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, hot: int = 0, text: str = "") -> Drafter:
        """hot: size of the draft vocabulary; 0 is all tokens. text: a file of which it has the most frequent ones."""
        return cls(model, load_mtp(model, hot_tokens(model, hot, text)), inner)

    @classmethod
    def planned_bytes(cls, target: Any, *, hot: int = 0) -> tuple[int, int]:
        """Bytes of the head's weights, and of one layer's keys and values per sequence."""
        if target.checkpoint is None:
            return 0, 0
        once, row = room(target.checkpoint, target.config, target.dtype, target.device, hot)
        return once, row * target.tokens

    @property
    def nbytes(self) -> int:
        return self.head.nbytes

    def begin(self, session: Writing) -> None:
        self._follow.begin(session)
        super().begin(session)

    def read(self, session: Writing, features: Sequence[Tensor]) -> None:
        self._follow.read(session, features[0])

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        rooms, depth, tokens = self._follow.rooms(sessions, limits), self._depth, self.head.tokens
        of_head = self.of_head
        return grow(self, sessions, rooms, ahead, inner=self.inner, depth=depth, vocabulary=tokens, of_head=of_head)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        last = self._follow.last(session)
        assert last is not None
        return Growth(self._follow.cache(session).open(), [last]), len(session.tokens) - 2, session.tokens[-1:]

    def forward(self, rows: Rows) -> Tensor:
        """The layer's outputs [r, width], before the head's norm."""
        return outputs(rows, self._next)

    def logits(self, hidden: Tensor) -> Tensor:
        """[r, D], over the draft vocabulary."""
        return self.head.decoder.logits(hidden)

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass

    def _run(self, rows: Rows, features: Tensor) -> Tensor:
        """Committed rows, of the target's states before its final norm."""
        x = self.head.enter(self._target.normed(features), self._target.embed(rows.tokens))
        return self.head.follow(rows, x)

    def _next(self, rows: Rows, before: Tensor) -> Tensor:
        """Draft tokens, of their parents' outputs."""
        x = self.head.enter(self.head.decoder.normed(before), self._target.embed(rows.tokens))
        return self.head.decoder.forward(rows, x)
