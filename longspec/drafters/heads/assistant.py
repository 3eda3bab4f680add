"""Gemma 4's assistant as a drafter (`longspec.heads.published.assistant`): a head that reads the target's own cache.

Takes a loaded target and its assistant. All drafted rows stand at the position of the text's last token, which the
cache doesn't have yet, and read the rows before it; they leave none, so that nothing is staged or rolled back. A local
layer reads what the target's row at that position would. A draft token's state is the head's own for its parent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspec.attention import attend
from longspec.cache.stage import Segment, Stage
from longspec.cache.tree import Tree
from longspec.drafters.common.tree_growth import grow
from longspec.heads.format import read_config, weights_bytes
from longspec.heads.published.assistant import Assistant, load_assistant
from longspec.model.decoder import Decoder, Rows
from longspec.model.load import Model
from longspec.types import Draft, Drafter, Needs, Writing

__all__ = ["Assisting"]

_DEPTH = 8
"""Depth limit of a draft; the control and the paths' probabilities stop most drafts earlier."""


@dataclass(slots=True)
class _Growth:
    """One session's draft tree, whose first row is the text's last token."""

    stage: Stage  # of the target's cache, with one row that nobody puts: where all rows of the draft stand
    root: Tensor  # [width]: the target's state before the last token
    states: list[Tensor] = field(default_factory=list)  # [width] each, by row: what rows behind it take
    tree: Tree = field(default_factory=Tree)

    def add(self, parents: Sequence[int]) -> slice:
        return self.tree.add(parents)

    @property
    def depths(self) -> Sequence[int]:
        return self.tree.depths

    def before(self, row: int) -> Tensor:
        parent = self.tree.parents[row]
        return self.root if parent < 0 else self.states[parent]

    def parts(self, place: int, queries: Tensor) -> Iterator[Segment]:
        """The committed rows that a row at the text's end reads."""
        for part in self.stage.parts(place, slice(0, 1), queries):
            kept = min(part.columns, self.stage.length - part.start)
            if kept > 0:
                yield part.cut(0, kept)


class Assisting(Drafter):
    """Drafts with a Gemma 4's assistant."""

    takes_inner = True

    def __init__(self, model: Model, head: Assistant, inner: Drafter | None = None) -> None:
        self.head, self.inner, self._target = head, inner, model.decoder
        self.needs = Needs(layers=(model.decoder.config.layers,))
        self._states: WeakKeyDictionary[Writing, tuple[int, Tensor]] = WeakKeyDictionary()

    @property
    def decoder(self) -> Decoder:
        return self._target

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = "") -> Drafter:
        return cls(model, load_assistant(Path(folder), read_config(folder), model), inner)

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        """Bytes of the head's weights; a text takes nothing."""
        return weights_bytes(folder, target.dtype), 0

    @property
    def nbytes(self) -> int:
        return self.head.nbytes

    def begin(self, session: Writing) -> None:
        self._states.pop(session, None)
        super().begin(session)

    def read(self, session: Writing, features: Sequence[Tensor]) -> None:
        if len(features[0]):
            self._states[session] = session.cache.length, features[0][-1]

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        known = [self._states.get(session, (0, None))[0] == len(session.tokens) - 1 for session in sessions]
        rooms = [limit if each else 0 for limit, each in zip(limits, known, strict=True)]
        return grow(self, sessions, rooms, ahead, inner=self.inner, depth=_DEPTH)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        length, state = self._states[session]
        stage = session.cache.open()
        stage.add([-1])
        return _Growth(stage, self._target.normed(state[None])[0]), length, session.tokens[-1:]

    def forward(self, rows: Rows) -> Tensor:
        """Normed outputs [r, w]: the sessions' first rows in one batch, then their second ones, and so on."""
        made = None
        for step in range(max(span.staged.stop - span.staged.start for span in rows.spans)):
            chosen = [slice(span.staged.start + step, span.staged.start + step + 1) for span in rows.spans]
            inside = [
                some if some.stop <= span.staged.stop else slice(0, 0)
                for some, span in zip(chosen, rows.spans, strict=True)
            ]
            part, at = rows.part(inside)
            growths: list[Any] = [span.stage for span in part.spans]
            before = [growth.before(span.staged.start) for growth, span in zip(growths, part.spans, strict=True)]
            positions = torch.tensor([growth.stage.length for growth in growths], device=part.tokens.device)

            def read(place: int, queries: Tensor, growths: Sequence[Any] = growths) -> Tensor:
                each = (queries[i : i + 1] for i in range(len(queries)))
                scale = self.head.config.scale
                return torch.cat(
                    [attend(own, growth.parts(place, own), scale) for own, growth in zip(each, growths, strict=True)]
                )

            embedded = self._target.embed(part.tokens)
            normed, states = self.head.run(embedded, torch.stack(before), positions, read)
            made = normed.new_empty(len(rows.tokens), normed.shape[1]) if made is None else made
            made[at] = normed
            for growth, state in zip(growths, states, strict=True):
                growth.states.append(state)
        assert made is not None
        return made

    def logits(self, hidden: Tensor) -> Tensor:
        """[r, V]."""
        return self.head.logits(hidden)

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass
