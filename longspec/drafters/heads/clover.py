"""A trained `Recurrent` head as a drafter: it reads the target's hidden states, and expands a tree with its cell.

Takes a loaded target and a `Trained` head. The engine hands over the hidden states of each committed token position
(`common/head_cache.py`). The head's layers have a KV cache of their own; a draft runs them once over the new
positions, and then the cell once per expanded node.

The layers and the output projection run through a `Decoder` of the head's size, and so through the target's kernels.
The cell runs in C where it can (`common/clover_native.py`); greedy sequences then expand their whole tree there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.cache.tree import Tree
from longspec.drafters.common.clover_native import Cell, missing
from longspec.drafters.common.head_cache import Follow
from longspec.drafters.common.tree_growth import grow
from longspec.heads.clover2 import Clover2
from longspec.heads.format import Trained, load_head, room
from longspec.heads.recurrent import Recurrent
from longspec.model.decoder import Decoder, Rows
from longspec.model.load import Model
from longspec.model.native import missing as kernel_lacks
from longspec.model.weights.read import Weights
from longspec.types import Draft, Drafter, Needs, Writing

__all__ = ["Head"]


@dataclass(slots=True)
class _Growth:
    """One session's draft tree, with the interface of a stage. Each node's state is computed from its parent's."""

    root: Tensor  # [width]
    tree: Tree = field(default_factory=Tree)
    states: list[Tensor] = field(default_factory=list)  # [width] each, by node

    def add(self, parents: Sequence[int]) -> slice:
        return self.tree.add(parents)

    @property
    def depths(self) -> Sequence[int]:
        return self.tree.depths


class Head(Drafter):
    """Drafts with a head such as Clover's; an empty draft where the target's hidden states aren't available."""

    takes_inner = True

    def __init__(self, model: Model, head: Trained, inner: Drafter | None = None) -> None:
        self.head, self.inner, self._target = head, inner, model.decoder
        assert isinstance(head.module, Recurrent)
        self._module: Recurrent = head.module
        config = head.config(model)
        held = {name: value.detach().to(model.decoder.dtype) for name, value in head.module.state_dict().items()}
        names = {name: value for name, value in held.items() if name.startswith("layers.")}
        names |= {"norm.weight": held["norm.weight"], "embed_tokens.weight": head.rows(model)}
        weights = Weights.of_tensors(names, model.decoder.dtype)
        target = model.decoder
        # int8 codes halve the bytes that are read; without the native kernel they are slower than bf16.
        coded = not target.strict and kernel_lacks(config, target.dtype, target.device) is None
        kind = "Q8_0" if coded else None
        self.decoder = Decoder(config, weights, target.device, strict=target.strict, coded=kind)
        self._places = None if head.tokens is None else head.tokens.to(target.device)
        self._follow = Follow(self.decoder.shape, self._run)
        self._cell: Cell | None = None
        if not target.strict and missing(head.module, self.decoder) is None:
            with torch.inference_mode():
                tokens = torch.arange(config.vocabulary) if self._places is None else self._places
                self._cell = Cell(head.module, self.decoder, target.embed(tokens), coded=coded)  # type: ignore[arg-type]
        self.needs = Needs(layers=head.reads(model))
        self._held_bytes: int = sum(value.nbytes for value in held.values())

    @property
    def nbytes(self) -> int:
        return self.decoder.nbytes + self._held_bytes + (0 if self._cell is None else self._cell.nbytes)

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = "") -> Drafter:
        return cls(model, load_head(folder, model), inner)

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        once, token = room(Path(folder), target.config)
        return once, token * target.tokens

    def begin(self, session: Writing) -> None:
        self._follow.begin(session)
        super().begin(session)

    def read(self, session: Writing, features: Sequence[Tensor]) -> None:
        self._follow.read(session, features[0] if len(features) == 1 else torch.cat(list(features), -1))

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        rooms = self._follow.rooms(sessions, limits)
        alone = ahead is None and self.inner is None
        if self._cell is not None and alone and all(session.is_plain for session in sessions):
            return [self._grown(self._cell, session, room) for session, room in zip(sessions, rooms, strict=True)]
        depth, places = self.head.depth, self._places
        return grow(self, sessions, rooms, ahead, inner=self.inner, depth=depth, vocabulary=places, of_head=True)

    def _grown(self, cell: Cell, session: Writing, room: int) -> Draft:
        last = self._follow.last(session)
        if not room or last is None:
            return Draft.chain(())
        return cell.draft(last, room, min(room, self.head.depth), self._places)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        last = self._follow.last(session)
        assert last is not None
        return _Growth(self._module.between(last)), len(session.tokens) - 1, session.tokens[-1:]

    def forward(self, rows: Rows) -> Tensor:
        """Outputs of the cell [r, width]: depth by depth, the nodes of one depth in one batch."""
        module, tokens = self._module, self._module.token_norm(self._target.embed(rows.tokens))
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

    def _run(self, rows: Rows, features: Tensor) -> Tensor:
        tokens, module = self._target.embed(rows.tokens), self._module
        if self._cell is None:
            return self.decoder.forward(rows, module.enter(features, module.token_norm(tokens)))
        entered = self._cell.enter(features[:, -tokens.shape[1] :], tokens)
        if module.fuse is not None:
            assert isinstance(module, Clover2)
            entered = module.fused(entered, features, module.token_norm(tokens))
        return self.decoder.forward(rows, entered)
