"""An EAGLE-3 head as a drafter (2503.01840): one layer over features of three of the target's layers.

Takes a loaded target and an `Eagle3` head. A row is a hidden state and the token that follows it. For a draft token the
hidden state is the head's own output for its parent, and its keys and values lie in a stage behind the committed ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.cache.tree import Tree
from longspec.drafters.common.head_cache import Follow
from longspec.drafters.common.tree_growth import grow
from longspec.heads.eagle3 import Eagle3, load_eagle3
from longspec.heads.format import read_config, weights_bytes
from longspec.model.decoder import Decoder, Rows, Span
from longspec.model.load import DTYPES, Model
from longspec.types import Draft, Drafter, Needs, Writing

__all__ = ["Eagle"]


@dataclass(slots=True)
class _Growth:
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


class Eagle(Drafter):
    """Drafts with an EAGLE-3 head."""

    def __init__(self, model: Model, head: Eagle3) -> None:
        self.head, self._target = head, model.decoder
        self.needs = Needs(layers=tuple(sorted(set(head.layers))))
        self._follow = Follow(head.shape(model.decoder.device, model.decoder.dtype), self._run)

    @property
    def decoder(self) -> Decoder:
        return self._target

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = "") -> Drafter:
        return cls(model, load_eagle3(Path(folder), read_config(folder), model))

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        """Bytes of the head's weights, and of one layer's keys and values (as wide as the target's) per sequence."""
        row = 2 * target.config.key_heads * target.config.head_dim * DTYPES[target.dtype].itemsize
        return weights_bytes(folder, target.dtype), row * target.tokens

    def begin(self, session: Writing) -> None:
        self._follow.begin(session)

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
        return grow(self, sessions, rooms, ahead, depth=self.head.depth, vocabulary=self.head.tokens)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        last = self._follow.last(session)
        assert last is not None
        return _Growth(self._follow.cache(session).open(), [last]), len(session.tokens) - 2, session.tokens[-1:]

    def forward(self, rows: Rows) -> Tensor:
        """The layer's outputs [r, width]: the sessions' first rows in one batch, then their second ones, and so on."""
        made = torch.empty(len(rows.tokens), self.head.width, dtype=self._target.dtype, device=self._target.device)
        for step in range(max(span.staged.stop - span.staged.start for span in rows.spans)):
            at: list[int] = []
            spans: list[Span] = []
            before: list[Tensor] = []
            for span in rows.spans:
                place = span.staged.start + step
                if place >= span.staged.stop:
                    continue
                growth: Any = span.stage
                if place == 0:
                    made[span.at.start] = growth.states[0]
                    continue
                before.append(growth.states[growth.tree.parents[place]])
                spans.append(Span(growth.stage, slice(place - 1, place), slice(len(at), len(at) + 1)))
                at.append(span.at.start + step)
            if at:
                part = replace(
                    rows, tokens=rows.tokens[at], positions=rows.positions[at], long=rows.long[at], spans=spans
                )
                made[at] = self.head.run(part, torch.stack(before), self._embed(part))
                for span in rows.spans:
                    if 0 < span.staged.start + step < span.staged.stop:
                        growth = span.stage
                        growth.states.append(made[span.at.start + step])
        return made

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
