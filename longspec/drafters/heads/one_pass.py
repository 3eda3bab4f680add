"""A trained `OnePass` head as a drafter: one pass of its layer, over the new positions and masks behind them.

Takes a loaded target and a `Trained` head. The layer has a KV cache of its own (`common/head_cache.py`), and runs
through a `Decoder` of its size, and so through the target's kernels; masks are staged behind the newest position and
always dropped. What the pass gives for a depth is the same for all nodes there, as with `AtOnce`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.drafters.common.head_cache import Follow
from longspec.drafters.heads.all_depths import AtOnce
from longspec.heads.format import Trained, room
from longspec.heads.one_pass import OnePass
from longspec.model.decoder import Decoder, Rows, Skip
from longspec.model.load import Model
from longspec.model.native import missing
from longspec.model.weights.read import Weights
from longspec.types import Writing

__all__ = ["Layered"]


class Layered(AtOnce):
    """Drafts with such a head; an empty draft where the target's hidden states aren't available."""

    def __init__(self, model: Model, head: Trained) -> None:
        super().__init__(model, head)
        assert isinstance(head.module, OnePass)
        module: OnePass = head.module
        self.breadth = None if module.TREE else 1
        config, target, held = head.config(model), model.decoder, module.state_dict()
        names = {name: value for name, value in held.items() if name.startswith("layers.")}
        names |= {"norm.weight": held["norm.weight"], "embed_tokens.weight": self._rows}
        # int8 codes halve the bytes that are read; without the native kernel they are slower than bf16.
        coded = not target.strict and missing(config, target.dtype, target.device) is None
        weights, kind = Weights.of_tensors(names, target.dtype), "Q8_0" if coded else None
        self._layer = Decoder(config, weights, target.device, strict=target.strict, coded=kind)
        self._skip = Skip(mlp=frozenset({0} if module.ATTENTION_ONLY else ()))
        masks = module.masks
        self._masks: Tensor | None = None if masks is None else masks.detach()
        self._follow = Follow(self._layer.shape, self._pass, 0 if masks is None else len(masks))

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        once, token = room(Path(folder), target.config)
        return once, token * target.tokens

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._layer.nbytes

    def begin(self, session: Writing) -> None:
        self._follow.begin(session)

    def read(self, session: Writing, features: Sequence[Tensor]) -> None:
        self._follow.read(session, torch.cat(list(features), -1))

    def rooms(self, sessions: Sequence[Writing], limits: Sequence[int]) -> list[int]:
        return self._follow.rooms(sessions, limits)

    def run(self, sessions: Sequence[Writing]) -> Tensor:
        newest = [last for session in sessions if (last := self._follow.last(session)) is not None]
        made: Tensor = self._module.drafted(torch.stack(newest))
        return self._layer.logits(made.flatten(0, 1)).view(*made.shape[:2], -1)

    def _pass(self, rows: Rows, features: Tensor) -> Tensor:
        """The layer's outputs [r, W]: each span's new positions, then its masks."""
        tokens, masks = self.decoder.embed(rows.tokens), self._masks
        if masks is None:
            return self._layer.forward(rows, self._module.enter(features, tokens), skip=self._skip)
        ends = [slice(span.at.stop - len(masks), span.at.stop) for span in rows.spans]
        own = torch.cat([tokens[span.at.start : end.start] for span, end in zip(rows.spans, ends, strict=True)])
        entered, inputs, at = self._module.enter(features, own), torch.empty_like(tokens), 0
        for span, end in zip(rows.spans, ends, strict=True):
            count = end.start - span.at.start
            inputs[span.at.start : end.start], inputs[end] = entered[at : at + count], masks
            at += count
        return self._layer.forward(rows, inputs, skip=self._skip)
