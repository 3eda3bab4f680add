"""A trained head as a drafter: it reads the target's hidden states, and grows a tree with its output cell.

Takes a loaded target and a `Trained` head. The engine hands over each committed row's hidden state (`Reading`); they
wait until the head is asked for a draft, so that a head that isn't used costs a pass of its layers every 64 rows and no
more. The layers keep keys and values of their own; a draft runs them once over the new rows, and then the cell once
per expanded node.

The layers and the last product run through a `Decoder` of the head's size, and so through the kernels of the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspec.cache.dense import Dense
from longspec.cache.stage import BLOCK
from longspec.drafters.grow import grow
from longspec.heads.format import Trained
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.load import Model
from longspec.model.weights import Weights
from longspec.tree import Tree
from longspec.types import Commit, Draft, Verdict, Writing

__all__ = ["Head"]


@dataclass(slots=True)
class _Notes:
    """What the head has of one session."""

    cache: Dense
    first: int = 0  # the text's row that its rows begin with: behind a snapshot's, which were never read
    waiting: list[Tensor] = field(default_factory=list)  # [m, width] each: rows that the layers haven't run
    last: Tensor | None = None  # [width]: what the layers gave for the newest row

    @property
    def done(self) -> int:
        """The text's rows up to which the layers have run."""
        return self.first + self.cache.length

    @property
    def lacking(self) -> int:
        return sum(map(len, self.waiting))


@dataclass(slots=True)
class _Growth:
    """The nodes of one session's tree, as a stage without keys: each node's state follows from its parent's."""

    root: Tensor  # [width]
    tree: Tree = field(default_factory=Tree)
    states: list[Tensor] = field(default_factory=list)

    def add(self, parents: Sequence[int]) -> slice:
        return self.tree.add(parents)

    @property
    def depths(self) -> Sequence[int]:
        return self.tree.depths


class Head:
    """Bets with a head. Without the target's hidden states (behind another drafter) it bets nothing."""

    def __init__(self, model: Model, head: Trained) -> None:
        self.head = head
        self._target = model.decoder
        config = head.config(model)
        held = {name: value.detach().to(model.decoder.dtype) for name, value in head.module.state_dict().items()}
        names = {name: value for name, value in held.items() if name.startswith("layers.")}
        names |= {"norm.weight": held["norm.weight"], "embed_tokens.weight": head.rows(model)}
        source = _Held(names)
        weights = Weights(dict.fromkeys(names, source), model.decoder.dtype)
        self.decoder = Decoder(config, weights, model.decoder.device, strict=model.decoder.strict)
        self._places = None if head.tokens is None else head.tokens.to(model.decoder.device)
        self._notes: WeakKeyDictionary[Writing, _Notes] = WeakKeyDictionary()

        self.layers = (self._target.config.layers,)

    def begin(self, session: Writing) -> None:
        self._notes[session] = _Notes(Dense(self.decoder.shape))

    def read(self, session: Writing, features: Tensor) -> None:
        notes, start = self._notes[session], session.cache.length - len(features)
        if start < notes.done + notes.lacking:  # the text was cut back
            notes.cache.truncate(max(0, min(start, notes.done) - notes.first))
            notes.waiting = []
        if start != notes.done + notes.lacking:  # it begins here, or lacks rows: older ones are forgotten
            notes.cache, notes.first, notes.waiting = Dense(self.decoder.shape), start, []
        notes.waiting.append(features)
        if notes.lacking >= BLOCK:
            with torch.inference_mode():
                self._catch_up([session])

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        self._catch_up([session for session, limit in zip(sessions, limits, strict=True) if limit > 0])
        known = [self._knows(session) for session in sessions]
        rooms = [limit if knows else 0 for limit, knows in zip(limits, known, strict=True)]
        return grow(self, sessions, rooms, ahead, depth=self.head.depth, vocabulary=self._places)

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        pass

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        last = self._notes[session].last
        assert last is not None
        return _Growth(last), len(session.tokens) - 1, session.tokens[-1:]

    def forward(self, rows: Rows) -> Tensor:
        """Node by node along each path, those of one depth together."""
        module, tokens = self.head.module, self.head.module.token_norm(self._target.embed(rows.tokens))
        made = torch.empty_like(tokens)
        lacking = [(span.stage, at) for span in rows.spans for at in range(span.staged.stop - span.staged.start)]
        starts = [span.at.start for span in rows.spans for _ in range(span.staged.stop - span.staged.start)]
        places = [span.staged.start + at for span in rows.spans for at in range(span.staged.stop - span.staged.start)]
        growths: list[Any] = [stage for stage, _ in lacking]
        for growth in {id(one): one for one in growths}.values():
            growth.states += [growth.root] * (len(growth.tree) - len(growth.states))
        depths = [growth.depths[place] for growth, place in zip(growths, places, strict=True)]
        for depth in sorted(set(depths)):
            chosen = [i for i, own in enumerate(depths) if own == depth]
            parents = [growths[i].tree.parents[places[i]] for i in chosen]
            before = [
                growths[i].states[parent] if parent >= 0 else growths[i].root
                for i, parent in zip(chosen, parents, strict=True)
            ]
            at = [starts[i] + lacking[i][1] for i in chosen]
            run = module.begin if depth == 0 else module.step
            states, outs = run(torch.stack(before), tokens[at])
            made[at] = outs
            for i, state in zip(chosen, states, strict=True):
                growths[i].states[places[i]] = state
        return made

    def logits(self, hidden: Tensor) -> Tensor:
        """[r, D], over the draft vocabulary."""
        return self.decoder.logits(hidden)

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass

    def _knows(self, session: Writing) -> bool:
        """Whether the newest row but the last token's own has been read."""
        notes = self._notes.get(session)
        return notes is not None and notes.last is not None and notes.done == len(session.tokens) - 1

    def _catch_up(self, sessions: Sequence[Writing]) -> None:
        """Run the layers over what waits, all sessions in one pass."""
        chunks, stages, features, notes = [], [], [], []
        for session in sessions:
            own = self._notes.get(session)
            if own is None or not own.waiting:
                continue
            start, count = own.done, own.lacking
            stage = own.cache.open()
            staged = stage.add(range(-1, count - 1))
            stages.append(stage)
            chunks.append(Chunk(stage, staged, session.tokens[start + 1 : start + count + 1], start, False))
            features += own.waiting
            notes.append(own)
        if not chunks:
            return
        rows, module = Rows.of(chunks, self.decoder.device), self.head.module
        tokens = module.token_norm(self._target.embed(rows.tokens))
        hidden = self.decoder.forward(rows, module.enter(torch.cat(features), tokens))
        newest = module.between(hidden[[span.at.stop - 1 for span in rows.spans]])
        for own, stage, last in zip(notes, stages, newest, strict=True):
            own.cache.commit(stage, range(len(stage.depths)))
            own.waiting, own.last = [], last


class _Held:
    """A head's tensors, as a checkpoint's file gives them."""

    path = Path("the head")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def take(self, name: str) -> Tensor:
        return self._tensors[name]

    def take_run(self, names: Sequence[str]) -> Tensor | None:
        return self._tensors[names[0]] if len(names) == 1 else None
