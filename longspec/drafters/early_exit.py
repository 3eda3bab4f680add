"""Early exit: the target's first layers and its LM head as a drafter (LayerSkip, 2404.16710; AdaDecode, ICML 2025).

A token position runs to the first exit. If the top probability there reaches the exit's threshold, that token is
drafted and becomes the next position; otherwise the position goes on to the next exit, together with all earlier ones
that stopped before it: so every position reads exact keys and values at the layers that it runs. Verification resumes
all positions where they stopped, in one forward pass (`Begun`). No layer is computed twice, and the result is that of
a full forward pass.

The thresholds adapt, one for each exit, towards a target acceptance (`_WANTED`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspec.errors import UsageError
from longspec.model.config import Config
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.types import Begun, Commit, Draft, Drafter, Verdict, Writing

__all__ = ["Exit", "usual"]

_WANTED = 0.8
"""Target acceptance, as a share of the drafted tokens."""

_RATE = 0.05
"""Step size of a threshold's adaptation, in probability."""

_LEAST, _MOST = 0.2, 0.98  # bounds of a threshold


@dataclass(slots=True)
class _Pending:
    """One session's token positions on their way through the layers."""

    session: Writing
    ahead: Sequence[int]
    limit: int
    stage: Any
    tokens: list[int]  # of the rows
    hidden: Tensor  # [rows, width]
    layers: list[int] = field(default_factory=list)  # that each row has run
    drafted: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)  # of the path up to each drafted token
    exits: list[int] = field(default_factory=list)  # index in `Exit.exits` at which each token was drafted

    def chunk(self, first: int) -> Chunk:
        staged = slice(first, len(self.tokens))
        return Chunk(self.stage, staged, self.tokens[first:], self.session.cache.length, self.session.long)


class Exit(Drafter):
    """Drafts at intermediate layers.

    exits: numbers of layers, ascending. Checkpoints that were trained with layer dropout can exit early.
    """

    serves = False  # its drafts carry partial forward passes, and must be verified unchanged

    def __init__(self, decoder: Decoder, exits: Sequence[int] | None = None) -> None:
        self.decoder = decoder
        self.exits = usual(decoder.config) if exits is None else tuple(exits)
        self.thresholds = [0.6] * len(self.exits)
        self._made: WeakKeyDictionary[Writing, list[int]] = WeakKeyDictionary()

    @classmethod
    def make(cls, model: Any, inner: Drafter | None = None, *, layers: str = "") -> Drafter:
        """layers: after which of them it may exit, such as 10/15/20; a third, a half and two thirds if empty, and of a
        looped model the end of each loop.
        """
        return cls(model.decoder, _exits(layers, model.decoder.config.layers) if layers else None)

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        drafts = [Draft.chain(()) for _ in sessions]
        guesses = ahead or [()] * len(sessions)
        empty = torch.empty(0, self.decoder.config.width, dtype=self.decoder.dtype, device=self.decoder.device)
        pending = {}
        for i, (session, limit, guess) in enumerate(zip(sessions, limits, guesses, strict=True)):
            if limit > 0 and self.exits:
                pending[i] = one = _Pending(session, guess, limit, session.cache.open(), [], empty)
                self._add(one, [*session.unfed, *guess])
        going = list(pending.values())
        while going:
            unsure = going
            for place, layer in enumerate(self.exits):
                self._advance(unsure, layer)
                unsure = self._draft(unsure, place)
                if not unsure:
                    break
            going = [one for one in going if one not in unsure and len(one.drafted) < one.limit]
            for one in going:
                self._add(one, one.drafted[-1:])
        for i, one in pending.items():
            self._made[one.session] = one.exits
            begun = None if one.ahead else Begun(one.stage, one.hidden, tuple(one.layers))
            drafts[i] = Draft(*_chain(one), begun, whole=begun is not None)
        return drafts

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        """A kept token lowers its exit's threshold, the first rejected one raises it: balanced at `_WANTED` kept."""
        made = self._made.pop(session, None)
        if made is None:
            return
        kept = len(verdict.kept)
        for place in made[:kept]:
            self._move(place, -_RATE * (1 - _WANTED))
        if kept < len(made):
            self._move(made[kept], _RATE * _WANTED)
        if not made:  # nothing was sure enough to be tried
            for place in range(len(self.exits)):
                self._move(place, -_RATE * (1 - _WANTED) / 4)

    def _move(self, place: int, by: float) -> None:
        self.thresholds[place] = min(_MOST, max(_LEAST, self.thresholds[place] + by))

    def _add(self, one: _Pending, tokens: Sequence[int]) -> None:
        """Append rows that have run no layer yet."""
        first = len(one.tokens)
        one.stage.add(range(first - 1, first + len(tokens) - 1))
        one.tokens += tokens
        one.layers += [0] * len(tokens)

    def _advance(self, pending: Sequence[_Pending], layer: int) -> None:
        """Run all rows up to `layer`. Those that lack layers are the last ones, and all have run equally many."""
        firsts = [sum(done >= layer for done in one.layers) for one in pending]
        rows = Rows.of([one.chunk(first) for one, first in zip(pending, firsts, strict=True)], self.decoder.device)
        done = pending[0].layers[-1]
        hidden = torch.cat([one.hidden[first:] for one, first in zip(pending, firsts, strict=True)]) if done else None
        hidden = self.decoder.forward(rows, hidden, done, layer)
        for one, first, span in zip(pending, firsts, rows.spans, strict=True):
            one.hidden = torch.cat((one.hidden[:first], hidden[span.at]))
            one.layers[first:] = [layer] * (len(one.tokens) - first)

    def _draft(self, pending: Sequence[_Pending], place: int) -> list[_Pending]:
        """Draft from each session's last row if it reaches the threshold; returns the sessions whose row doesn't."""
        logits = self.decoder.logits(torch.stack([one.hidden[-1] for one in pending]))
        unsure = []
        for one, row in zip(pending, logits, strict=True):
            tokens, probs = one.session.rank(row[None], [[*one.ahead, *one.drafted]], 1)
            if (chance := probs.item()) < self.thresholds[place]:
                unsure.append(one)
                continue
            one.drafted.append(int(tokens.item()))
            one.probs.append(chance * (one.probs[-1] if one.probs else 1.0))
            one.exits.append(place)
        return unsure


def usual(config: Config) -> tuple[int, ...]:
    """Default exits: after a third, a half and two thirds of the layers, without duplicates; of a looped model after
    each loop, where its head is at home.
    """
    layers = config.layers
    if config.loops > 1:
        return tuple(range(config.group, layers, config.group))
    return tuple(sorted({layers // 3, layers // 2, layers * 2 // 3} - {0, layers}))


def _exits(text: str, layers: int) -> tuple[int, ...]:
    """The numbers of layers in an option's text."""
    try:
        exits = tuple(sorted({int(word) for word in text.split("/")}))
    except ValueError:
        exits = (0,)
    if not 0 < exits[0] <= exits[-1] < layers:
        raise UsageError(f"exit:layers={text} should be numbers from 1 to {layers - 1} with / between them.")
    return exits


def _chain(one: _Pending) -> tuple[Tensor, Tensor, Tensor]:
    made = Draft.tree(one.drafted, range(-1, len(one.drafted) - 1), one.probs)
    assert made.probs is not None
    return made.tokens, made.parents, made.probs
