"""Early exit: the target's first layers and its LM head as a drafter (LayerSkip, 2404.16710; AdaDecode, ICML 2025).

A token position runs to the first exit. If the top probability there reaches the exit's threshold, that token is
drafted and becomes the next position; otherwise the position goes on to the next exit, together with all earlier ones
that stopped before it: so every position reads exact keys and values at the layers that it runs. Verification resumes
all positions where they stopped, in one forward pass (`Begun`). No layer is computed twice, and the result is that of
a full forward pass.

An exit reads the target's own LM head, or, of a trained head (`longspec.heads.exits`), a matrix and the rows of a
draft vocabulary. The thresholds adapt, one for each exit, towards a target acceptance (`WANTED`); a trained head's
begin where held-out texts put them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspec.errors import UsageError
from longspec.heads.exits import WANTED, Exits
from longspec.heads.format import Trained, load_head, room
from longspec.model.config import Config
from longspec.model.decoder import Chunk, Rows
from longspec.model.load import Model
from longspec.types import Begun, Commit, Draft, Drafter, Verdict, Writing

__all__ = ["Exit", "usual"]

_RATE = 0.05
"""Step size of a threshold's adaptation, in probability."""

_LEAST, _MOST = 0.2, 0.98  # bounds of a threshold
_THRESHOLD = 0.6  # without a head, to begin with


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

    exits: numbers of layers, ascending; a trained head's own, if left out. Checkpoints that were trained with layer
    dropout can exit early without a head.
    """

    serves = False  # its drafts carry partial forward passes, and must be verified unchanged

    def __init__(self, model: Model, head: Trained | None = None, exits: Sequence[int] | None = None) -> None:
        self.decoder, self.head = model.decoder, head
        self.exits = tuple(exits or (usual(model.decoder.config) if head is None else head.reads(model)))
        self.thresholds = [_THRESHOLD] * len(self.exits)
        if head is not None:
            assert isinstance(head.module, Exits)
            self._module: Exits = head.module.to(model.decoder.dtype)
            self._numbers = [self._module.reads.index(layer) for layer in self.exits]  # of the head's own exits
            self.thresholds = [float(self._module.thresholds[number]) for number in self._numbers]
            self._rows = head.rows(model)
            self._places = None if head.tokens is None else head.tokens.to(model.decoder.device)
        self._made: WeakKeyDictionary[Writing, list[int]] = WeakKeyDictionary()

    @classmethod
    def make(cls, model: Any, inner: Drafter | None = None, *, layers: str = "", folder: str | Path = "") -> Drafter:
        """layers: after which of them it may exit, such as 10/15/20; empty: a third, a half and two thirds, the end of
        each loop of a looped model, or a trained head's own. folder: of such a head.
        """
        count = model.decoder.config.layers
        exits = _exits(layers, count) if layers else None
        if not folder:
            return cls(model, exits=exits)
        head = load_head(folder, model)
        if not isinstance(head.module, Exits):
            raise UsageError(f"{folder} holds a {head.kind} head, and the drafter exit takes an exits head; name one, "
                             f"or draft with --drafter {folder}.")  # fmt: skip
        own = head.module.reads
        if [*own] != sorted({*own} & {*range(1, count)}):
            raise UsageError(f"The head in {folder} is damaged: its exits {list(own)} aren't rising, from 1 to "
                             f"{count - 1}; fetch it again, or train anew.")  # fmt: skip
        if not {*(exits or ())} <= {*own}:
            raise UsageError(f"The head in {folder} has no exits {layers}, but {'/'.join(map(str, own))}; name some "
                             "of these.")  # fmt: skip
        return cls(model, head, exits)

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        once, text = super().planned_bytes(target)
        return once + (room(Path(folder), target.config)[0] if folder else 0), text

    @property
    def nbytes(self) -> int:
        if self.head is None:
            return 0
        own: int = sum(value.nbytes for value in self._module.state_dict().values())
        return own + (0 if self._places is None else self._rows.nbytes)

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        drafts = [Draft.chain(()) for _ in sessions]
        guesses = ahead or [()] * len(sessions)
        empty = torch.empty(0, self.decoder.config.width, dtype=self.decoder.dtype, device=self.decoder.device)
        pending = {}
        for i, (session, limit, guess) in enumerate(zip(sessions, limits, guesses, strict=True)):
            most = limit if self.head is None else min(limit, self.head.depth)
            if most > 0 and self.exits:
                pending[i] = one = _Pending(session, guess, most, session.cache.open(), [], empty)
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
        """A kept token lowers its exit's threshold, the first rejected one raises it: balanced at `WANTED` kept."""
        made = self._made.pop(session, None)
        if made is None:
            return
        kept = len(verdict.kept)
        for place in made[:kept]:
            self._move(place, -_RATE * (1 - WANTED))
        if kept < len(made):
            self._move(made[kept], _RATE * WANTED)
        if not made:  # nothing was sure enough to be tried
            for place in range(len(self.exits)):
                self._move(place, -_RATE * (1 - WANTED) / 4)

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
        logits, vocabulary = self._logits(torch.stack([one.hidden[-1] for one in pending]), place)
        unsure = []
        for one, row in zip(pending, logits, strict=True):
            tokens, probs = one.session.rank(row[None], [[*one.ahead, *one.drafted]], 1, vocabulary)
            if (chance := probs.item()) < self.thresholds[place]:
                unsure.append(one)
                continue
            one.drafted.append(int(tokens.item()))
            one.probs.append(chance * (one.probs[-1] if one.probs else 1.0))
            one.exits.append(place)
        return unsure

    def _logits(self, hidden: Tensor, place: int) -> tuple[Tensor, Tensor | None]:
        """Logits of hidden states [r, width] at an exit, and the tokens that they are of; None is all."""
        if self.head is None:
            return self.decoder.logits(hidden), None
        logits, cap = self._module.exit(self._numbers[place], hidden) @ self._rows.T, self.decoder.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap, self._places


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
