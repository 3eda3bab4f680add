"""Block drafters (`longspec.heads.published.blocks`): one pass over a block gives the logits of all of its places.

Takes a loaded target and `Blocks`. Committed positions leave keys and values of the target's states in a cache of its
own; a block leaves nothing. Where its places know nothing of each other's tokens (DFlash) all nodes of a depth have the
same candidates, and the tree is the best one by their chances; DSpark's bias tells a node what its own token was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.cache.tree import Tree
from longspec.drafters.common.head_cache import Follow
from longspec.drafters.common.tree_growth import grow
from longspec.heads.format import read_config, weights_bytes
from longspec.heads.published.blocks import Blocks, load_blocks
from longspec.model.decoder import Decoder, Rows
from longspec.model.load import DTYPES, Model
from longspec.types import Draft, Drafter, Needs, Writing

__all__ = ["Blockwise"]


@dataclass(slots=True)
class _Growth:
    """One session's draft tree over a block."""

    outputs: Tensor  # [depth, width], of the places that tokens are drafted from
    logits: Tensor  # [depth, D]
    states: Tensor  # [rows, rank]
    tree: Tree = field(default_factory=Tree)

    def add(self, parents: Sequence[int]) -> slice:
        return self.tree.add(parents)

    @property
    def depths(self) -> Sequence[int]:
        return self.tree.depths


class Blockwise(Drafter):
    """Drafts with such a head; an empty draft where the newest position's hidden states aren't known."""

    def __init__(self, model: Model, head: Blocks) -> None:
        self.head, self._target = head, model.decoder
        self.needs = Needs(layers=tuple(sorted(set(head.layers))))
        self._follow = Follow(head.shape(model.decoder.device, model.decoder.dtype), head.fill)

    @property
    def decoder(self) -> Decoder:
        return self._target

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = "") -> Drafter:
        return cls(model, load_blocks(Path(folder), read_config(folder), model))

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        """Bytes of the weights, and of all layers' keys and values (as wide as the target's) per sequence."""
        layers = (read_config(folder).get("transformer_layer_config") or {}).get("num_hidden_layers") or 1
        row = 2 * target.config.key_heads * target.config.head_dim * DTYPES[target.dtype].itemsize
        return weights_bytes(folder, target.dtype), int(layers) * row * target.tokens

    @property
    def nbytes(self) -> int:
        return self.head.nbytes

    def begin(self, session: Writing) -> None:
        self._follow.begin(session)

    def read(self, session: Writing, features: Sequence[Tensor]) -> None:
        by_layer = dict(zip(self.needs.layers, features, strict=True))
        self._follow.read(session, torch.cat([by_layer[layer] for layer in self.head.layers], -1))

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        longest = max(map(len, ahead), default=0) if ahead else 0
        left = self.head.depth - longest
        rooms = self._follow.rooms(sessions, [limit if left > 0 else 0 for limit in limits])
        return grow(self, sessions, rooms, ahead, depth=max(1, left), vocabulary=self.head.tokens, of_head=True)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        head, cache = self.head, self._follow.cache(session)
        tokens = torch.tensor([session.tokens[-1], *[head.mask] * (head.size - 1)], device=self._target.device)
        own = head.embedding
        embedded = self._target.embed(tokens) if own is None else torch.nn.functional.embedding(tokens, own)
        text = [cache.rows(layer) for layer in range(head.config.layers)]
        outputs = head.outputs(embedded, text, len(session.tokens) - 1)[head.first :]
        states = outputs.new_zeros(0, head.rank)
        return _Growth(outputs, outputs @ head.head.T, states), len(session.tokens) - 1, session.tokens[-1:]

    def forward(self, rows: Rows) -> Tensor:
        """Logits [r, D] rather than hidden states."""
        made = []
        for span in rows.spans:
            growth: Any = span.stage
            for i, token in zip(range(span.staged.start, span.staged.stop), rows.tokens[span.at], strict=True):
                depth, parent = growth.depths[i], growth.tree.parents[i]
                before = growth.states[parent] if parent >= 0 else growth.states.new_zeros(self.head.rank)
                bias, state = self.head.bias(token[None], growth.outputs[depth, None], before[None])
                growth.states = torch.cat((growth.states, state))
                made.append(growth.logits[depth] if bias is None else growth.logits[depth] + bias[0])
        return torch.stack(made)

    def logits(self, hidden: Tensor) -> Tensor:
        """The argument: `forward` gives logits already."""
        return hidden

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass
