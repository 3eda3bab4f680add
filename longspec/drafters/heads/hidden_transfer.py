"""A trained `Transfer` head as a drafter: rows without a token, in a pass of the target's last layers.

Takes a loaded target and a `Trained` head. The rows of the newest position, whose states the target's pass left, are
staged behind the text at the layers that they run, and dropped with their stage: nothing of them can be committed. All
nodes of one depth have the same candidates, as with every `AtOnce` drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from longspec.drafters.heads.all_depths import AtOnce
from longspec.errors import UsageError
from longspec.heads.format import Trained, load_head
from longspec.heads.transfer import Transfer
from longspec.model.decoder import Chunk, Rows
from longspec.model.load import Model
from longspec.types import Drafter, Needs, Writing

__all__ = ["HiddenTransfer"]


class HiddenTransfer(AtOnce):
    def __init__(self, model: Model, head: Trained) -> None:
        super().__init__(model, head)
        assert isinstance(head.module, Transfer)
        self._places_of_rows = [*dict.fromkeys(head.module.joins), model.decoder.config.layers]
        self.needs = Needs(layers=tuple(self._places_of_rows[:-1]))

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = "") -> Drafter:
        head, layers = load_head(folder, model), model.decoder.config.layers
        reads = head.module.reads
        if [*reads] != sorted({*reads} - {0}) or reads[-1] != layers:
            raise UsageError(f"The head in {folder} is damaged: the layers {list(reads)} aren't rising up to {layers}; "
                             "fetch it again, or train anew.")  # fmt: skip
        return cls(model, head)

    def _outputs(self, sessions: Sequence[Writing]) -> Tensor:
        stages = [session.cache.open() for session in sessions]
        width, decoder = self.decoder.config.width, self.decoder
        states = torch.split(torch.stack([self._newest[session][1] for session in sessions]), width, -1)
        rows: Tensor = states[0].new_empty(len(sessions), 0, width)
        for (first, last), read in zip(pairwise(self._places_of_rows), states, strict=True):
            new = torch.stack(self._module.joining(first, read), 1)
            rows = torch.cat((rows, new), 1)
            for stage in stages:
                stage.add(range(rows.shape[1] - new.shape[1] - 1, rows.shape[1] - 1))
            count = rows.shape[1]
            chunks = [
                Chunk(stage, slice(0, count), [0] * count, session.cache.length, session.long)
                for stage, session in zip(stages, sessions, strict=True)
            ]
            run = decoder.forward(Rows.of(chunks, decoder.device), rows.flatten(0, 1), first, last)
            rows = run.view(len(sessions), count, width)
        return rows
