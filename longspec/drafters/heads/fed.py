"""Heads of EAGLE-3 and of multi-token prediction that were trained here, as drafters: as those that others publish.

Takes a loaded target and a `Trained` head, whose module gives its weights under their names (`Eagle3`, `Mtp`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspec.drafters.heads.eagle3 import Eagle
from longspec.drafters.heads.mtp import Multitoken
from longspec.heads.format import Trained, load_head, read_config, room, weights_bytes
from longspec.heads.published.eagle3 import eagle3_of
from longspec.heads.published.mtp import mtp_folder, mtp_of
from longspec.model.load import DTYPES, Model
from longspec.types import Drafter

__all__ = ["PublishedMtp", "TrainedEagle", "TrainedMtp"]


class TrainedEagle(Eagle):
    """Drafts with a head of the kind `eagle3`."""

    def __init__(self, model: Model, head: Trained, inner: Drafter | None = None) -> None:
        super().__init__(model, eagle3_of(model, head), inner)

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = "") -> Drafter:
        return cls(model, load_head(folder, model), inner)

    @classmethod
    def planned_bytes(cls, target: Any, *, folder: str | Path = "") -> tuple[int, int]:
        once, row = room(Path(folder), target.config)
        return once, row * target.tokens


class TrainedMtp(Multitoken):
    """Drafts with a head of the kind `fastmtp`."""

    of_head = True

    def __init__(self, model: Model, head: Trained, inner: Drafter | None = None) -> None:
        super().__init__(model, mtp_of(model, head), inner, depth=head.depth)

    @classmethod
    def make(  # type: ignore[override]
        cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = ""
    ) -> Drafter:
        return cls(model, load_head(folder, model), inner)

    @classmethod
    def planned_bytes(  # type: ignore[override]
        cls, target: Any, *, folder: str | Path = ""
    ) -> tuple[int, int]:
        once, row = room(Path(folder), target.config)
        return once, row * target.tokens


class PublishedMtp(Multitoken):
    """Drafts with a head in the layout of `speculators`."""

    @classmethod
    def make(  # type: ignore[override]
        cls, model: Model, inner: Drafter | None = None, *, folder: str | Path = ""
    ) -> Drafter:
        return cls(model, mtp_folder(Path(folder), read_config(folder), model), inner)

    @classmethod
    def planned_bytes(  # type: ignore[override]
        cls, target: Any, *, folder: str | Path = ""
    ) -> tuple[int, int]:
        row = 2 * target.config.key_heads * target.config.head_dim * DTYPES[target.dtype].itemsize
        return weights_bytes(folder, target.dtype), row * target.tokens
