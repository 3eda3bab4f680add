"""A smaller model with a cache of its own, betting for the target (speculative sampling, 2302.01318).

Takes a loaded draft model whose vocabulary is the target's, or nearly: tokens are matched by their strings. A match can
cost acceptance and never the text, since the target has the last word; a vocabulary that shares too little is refused.

What the draft model computed for tokens that were kept stays in its cache: after a step it lacks the last token only,
or the two last ones where the whole draft was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspec.cache.dense import Dense
from longspec.cache.stage import Cache
from longspec.drafters.common.tree_growth import grow
from longspec.errors import UsageError
from longspec.model.decoder import Chunk, Rows
from longspec.model.load import Model
from longspec.types import Commit, Draft, Drafter, Verdict, Writing

__all__ = ["SHARED", "Smaller", "match"]

SHARED = 0.9
"""The least share of the target's vocabulary that the draft model must have: what it lacks, it can't draft."""

_CHUNK = 512


@dataclass(slots=True)
class _Notes:
    """What the draft model has of one session."""

    cache: Cache
    stage: Any = None  # of the last draft
    rows: Sequence[tuple[int, int]] = ()


class Smaller:
    """Drafts by a draft model. `inner` bets for it in turn.

    Raises:
        UsageError: the vocabularies have too little in common.
    """

    def __init__(self, target: Model, draft: Model, inner: Drafter | None = None) -> None:
        self.decoder, self.nbytes = draft.decoder, draft.decoder.nbytes
        self.inner = inner
        self._places = match(target, draft)
        self._notes: WeakKeyDictionary[Writing, _Notes] = WeakKeyDictionary()

    def begin(self, session: Writing) -> None:
        self._notes[session] = _Notes(Dense(self.decoder.shape))
        if self.inner is not None:
            self.inner.begin(session)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        context, guesses = self.decoder.config.context, ahead or [()] * len(sessions)
        rooms = [
            max(0, min(limit, context - len(session.tokens) - len(guess)))
            for session, limit, guess in zip(sessions, limits, guesses, strict=True)
        ]
        return grow(self, sessions, rooms, ahead, inner=self.inner)

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        if self.inner is not None:
            self.inner.observe(session, commit, verdict)

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
            rows = replace(rows, tokens=self._places[rows.tokens].clamp(min=0))  # what it lacks is guessed over
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
    """[V] int64: for each of the target's tokens the draft model's of the same string, or -1; None where all ids agree.

    Raises:
        UsageError: the draft model has less than nine tenths of the target's tokens.
    """
    wanted = target.vocabulary.tokenizer.get_vocab(with_added_tokens=True)
    had = draft.vocabulary.tokenizer.get_vocab(with_added_tokens=True)
    size = draft.decoder.config.vocabulary
    same = sum(had.get(token, size) < size for token in wanted)
    if same < SHARED * len(wanted):
        raise UsageError(
            f"The draft model {draft.name} has {same:,} of the {len(wanted):,} tokens of {target.name}, and "
            f"{SHARED:.0%} are needed; take a smaller model of the same family."
        )
    places = torch.full((target.decoder.config.vocabulary,), -1)
    for token, place in wanted.items():
        if place < len(places) and had.get(token, size) < size:
            places[place] = had[token]
    if len(places) == size and bool((places == torch.arange(size)).all()):
        return None
    return places.to(draft.decoder.device)


def _written(rows: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[int]:
    """The stage's rows that hold these tokens, one behind the other, as far as there are such."""
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
