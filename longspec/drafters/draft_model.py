"""A smaller model with its own KV cache as a drafter (speculative sampling, 2302.01318).

Takes a loaded draft model whose vocabulary is the target's, or nearly: tokens are matched by their strings. A wrong
match costs acceptance and never changes the text, since the target verifies; a vocabulary that shares too little is
refused.

Keys and values of kept draft tokens stay in the draft model's cache: after a step it lacks the last token, or the last
two if the whole draft was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspec.cache import CACHES
from longspec.cache.recurrent import States
from longspec.cache.stage import Cache, Shape
from longspec.drafters.common.tree_growth import grow
from longspec.errors import UsageError
from longspec.model.decoder import Chunk, Rows
from longspec.model.layer import shape_of
from longspec.model.load import CODED, DTYPES, Model, open_model
from longspec.model.weights.footprint import footprint
from longspec.semantic.steps import Steps
from longspec.text.tokenizer import Vocabulary
from longspec.types import Draft, Drafter, Writing

__all__ = ["SHARED", "DraftModel", "check_vocabulary", "match"]

SHARED = 0.9
"""Least share of the target's vocabulary that the draft model must have; it can't draft the other tokens."""

_CHUNK = 512  # tokens of one prefill pass


@dataclass(slots=True)
class _Notes:
    """The draft model's state of one session."""

    cache: Cache
    stage: Any = None  # of the last draft
    rows: Sequence[tuple[int, int]] = ()  # of that stage: token, and parent row or -1


class DraftModel(Drafter):
    """Drafts with a draft model, which `inner` may draft for in turn. steps: each draft is a chain up to the end of a
    reasoning step, rather than a tree of what is probable.

    Raises:
        UsageError: the vocabularies have too little in common.
    """

    takes_inner = True

    def __init__(self, target: Model, draft: Model, inner: Drafter | None = None, *, steps: bool = False) -> None:
        self.decoder = draft.decoder
        self._over = Steps(target.vocabulary, target.end_tokens).over if steps else None
        self.inner = inner
        self._places = match(target, draft)
        self._notes: WeakKeyDictionary[Writing, _Notes] = WeakKeyDictionary()

    @classmethod
    def make(
        cls,
        model: Model,
        inner: Drafter | None = None,
        *,
        draft: str | Path | Model | None = None,
        steps: bool = False,
    ) -> Drafter:
        """draft: the draft model, loaded or by name; a name is loaded in the target's dtype, on its device."""
        if draft is None:
            raise UsageError("The drafter model needs a draft model: name one (--draft-model, or model:draft=NAME).")
        if not isinstance(draft, Model):
            opened = open_model(str(draft), dtype=model.dtype, device=str(model.decoder.device))
            draft = opened.load(strict=model.decoder.strict)
        return cls(model, draft, inner, steps=steps)

    @classmethod
    def planned_bytes(cls, target: Any, *, draft: str | Path | Model | None = None) -> tuple[int, int]:
        """Bytes of the draft model's weights, by its files, and of its dense KV cache for each sequence."""
        if draft is None:
            return 0, 0
        if isinstance(draft, Model):
            return draft.decoder.nbytes, _cache_bytes(draft.decoder.shape, target.tokens)
        opened = open_model(str(draft), dtype=target.dtype, device=str(target.device))
        c, dtype = opened.config, DTYPES[opened.dtype]
        held = _cache_bytes(shape_of(c, dtype, opened.device), target.tokens)
        return footprint(opened.checkpoint, c, dtype, CODED.get(opened.dtype)).resident, held

    @property
    def nbytes(self) -> int:
        return self.decoder.nbytes

    def begin(self, session: Writing) -> None:
        self._notes[session] = _Notes(CACHES["dense"](self.decoder.shape))
        super().begin(session)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        context, guesses = self.decoder.config.context, ahead or [()] * len(sessions)
        rooms = [
            max(0, min(limit, context - len(session.tokens) - len(guess)))
            for session, limit, guess in zip(sessions, limits, guesses, strict=True)
        ]
        return grow(self, sessions, rooms, ahead, inner=self.inner, over=self._over)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        notes, tokens = self._notes[session], session.tokens
        cache = notes.cache
        if notes.stage is not None:
            cache.commit(notes.stage, _written(notes.rows, tokens[cache.length : -1]))
            notes.stage = None
        while len(tokens) - cache.length > _CHUNK:
            self._feed(cache, tokens[cache.length : cache.length + _CHUNK], long=session.long)
        return cache.open(), cache.length, tokens[cache.length :]

    def forward(self, rows: Rows) -> Tensor:
        if self._places is not None:
            rows = replace(rows, tokens=self._places[rows.tokens].clamp(min=0))  # token 0 stands for unmatched ones
        return self.decoder.forward(rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """[r, width] to [r, V] over the target's vocabulary; -inf for tokens that the draft model doesn't have."""
        logits = self.decoder.logits(hidden)
        if self._places is None:
            return logits
        return logits[:, self._places.clamp(min=0)].masked_fill_(self._places < 0, float("-inf"))

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        notes = self._notes[session]
        notes.stage, notes.rows = stage, rows

    def _feed(self, cache: Cache, tokens: Sequence[int], *, long: bool) -> None:
        stage = cache.open()
        staged = stage.add(range(-1, len(tokens) - 1))
        self.forward(Rows.of([Chunk(stage, staged, tokens, cache.length, long)], self.decoder.device))
        cache.commit(stage, range(len(tokens)))


def match(target: Model, draft: Model) -> Tensor | None:
    """[V] int64: the draft model's id of each target token with the same string, or -1; None if all ids agree.

    Raises:
        UsageError: the draft model has less than nine tenths (`SHARED`) of the target's tokens.
    """
    size = draft.decoder.config.vocabulary
    wanted, had = check_vocabulary((target.name, target.vocabulary), (draft.name, draft.vocabulary), size)
    places = torch.full((target.decoder.config.vocabulary,), -1)
    for token, place in wanted.items():
        if place < len(places) and had.get(token, size) < size:
            places[place] = had[token]
    if len(places) == size and bool((places == torch.arange(size)).all()):
        return None
    return places.to(draft.decoder.device)


def check_vocabulary(
    target: tuple[str, Vocabulary], draft: tuple[str, Vocabulary], size: int
) -> tuple[dict[str, int], dict[str, int]]:
    """The tokens of target and draft model, each given by name and vocabulary; size: rows of the draft's embeddings.
    No weights are needed.

    Raises:
        UsageError: the draft model has less than nine tenths (`SHARED`) of the target's tokens.
    """
    wanted, had = (vocabulary.tokenizer.get_vocab(with_added_tokens=True) for _, vocabulary in (target, draft))
    same = sum(had.get(token, size) < size for token in wanted)
    if same < SHARED * len(wanted):
        raise UsageError(
            f"The draft model {draft[0]} has {same:,} of the {len(wanted):,} tokens of {target[0]}, and "
            f"{SHARED:.0%} are needed; take a smaller model of the same family."
        )
    return wanted, had


def _cache_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of a dense cache of so many rows."""
    return tokens * shape.row_bytes + (States.room(shape.states) if shape.states is not None else 0)


def _written(rows: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[int]:
    """The stage's rows along the path of these tokens, up to the first token that was not staged."""
    children: dict[tuple[int, int], int] = {}
    for row, (token, parent) in enumerate(rows):
        children.setdefault((parent, token), row)
    found: list[int] = []
    for token in tokens:
        at = (found[-1] if found else -1, token)
        if at not in children:
            break
        found.append(children[at])
    return found
