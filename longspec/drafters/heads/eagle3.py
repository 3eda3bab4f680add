"""An EAGLE-3 head as a drafter (2503.01840): one layer over features of three of the target's layers.

Takes a loaded target and an `Eagle3` head. A row is a hidden state and the token that follows it. For a draft token the
hidden state is the head's own output for its parent, and its keys and values lie in a stage behind the committed ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.drafters.common.feedback import Growth, outputs
from longspec.drafters.common.head_cache import Follow
from longspec.drafters.common.tree_growth import grow
from longspec.heads.format import read_config, weights_bytes
from longspec.heads.published.eagle3 import Eagle3, load_eagle3
from longspec.model.decoder import Decoder, Rows
from longspec.model.load import DTYPES, Model
from longspec.types import Draft, Drafter, Needs, Writing

__all__ = ["Eagle"]


class Eagle(Drafter):
    """Drafts with an EAGLE-3 head."""

    takes_inner = True

    def __init__(self, model: Model, head: Eagle3, inner: Drafter | None = None) -> None:
        self.head, self.inner, self._target = head, inner, model.decoder
        self.needs = Needs(layers=tuple(sorted(set(head.layers))))
        self._follow = Follow(head.shape(model.decoder.device, model.decoder.dtype), self._run)

    @property
    def decoder(self) -> Decoder:
        return self._target

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = "") -> Drafter:
        return cls(model, load_eagle3(Path(folder), read_config(folder), model), inner)

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        """Bytes of the head's weights, and of one layer's keys and values (as wide as the target's) per sequence."""
        row = 2 * target.config.key_heads * target.config.head_dim * DTYPES[target.dtype].itemsize
        return weights_bytes(folder, target.dtype), row * target.tokens

    def begin(self, session: Writing) -> None:
        self._follow.begin(session)
        super().begin(session)

    @property
    def nbytes(self) -> int:
        return self.head.nbytes

    def read(self, session: Writing, features: Sequence[Tensor]) -> None:
        by_layer = dict(zip(self.needs.layers, features, strict=True))
        self._follow.read(session, torch.cat([by_layer[layer] for layer in self.head.layers], -1))

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        rooms = self._follow.rooms(sessions, limits)
        depth, tokens = self.head.depth, self.head.tokens
        return grow(self, sessions, rooms, ahead, inner=self.inner, depth=depth, vocabulary=tokens, of_head=True)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        last = self._follow.last(session)
        assert last is not None
        return Growth(self._follow.cache(session).open(), [last]), len(session.tokens) - 2, session.tokens[-1:]

    def forward(self, rows: Rows) -> Tensor:
        """The layer's outputs [r, width]."""
        return outputs(rows, lambda part, before: self.head.run(part, before, self._embed(part)))

    def logits(self, hidden: Tensor) -> Tensor:
        """[r, D], over the draft vocabulary."""
        return self.head.logits(hidden)

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass

    def _run(self, rows: Rows, features: Tensor) -> Tensor:
        return self.head.run(rows, self.head.enter(features), self._embed(rows))

    def _embed(self, rows: Rows) -> Tensor:
        own = self.head.embedding
        return self._target.embed(rows.tokens) if own is None else torch.nn.functional.embedding(rows.tokens, own)
