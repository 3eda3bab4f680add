"""Registry of drafters, by the names that the command and the engine take.

A new drafter is a file with a subclass of `longspec.types.Drafter`, and a line in `DRAFTERS`; the losslessness tests
run every drafter of that dict. Other packages add drafters by the entry point `longspec.drafters`
(`longspec.drafters.spec`). A trained draft head is named by its folder, or by its kind where one ships with longspec
for the model. Formats of others are lines in `HEADS`; how one of our own drafts is said by the class that its module is
made from, in `WAYS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from longspec.drafters.draft_model import DraftModel
from longspec.drafters.early_exit import Exit
from longspec.drafters.heads.all_depths import AtOnce
from longspec.drafters.heads.assistant import Assisting
from longspec.drafters.heads.blocks import Blockwise
from longspec.drafters.heads.clover import Head
from longspec.drafters.heads.eagle3 import Eagle
from longspec.drafters.heads.fed import PublishedMtp, TrainedEagle, TrainedMtp
from longspec.drafters.heads.hidden_transfer import HiddenTransfer
from longspec.drafters.heads.medusa import Medusa
from longspec.drafters.heads.mtp import Multitoken
from longspec.drafters.heads.one_pass import Layered
from longspec.drafters.layer_skip import Skipping
from longspec.drafters.lookahead import Lookahead
from longspec.drafters.ngram import Ngram
from longspec.drafters.none import Nothing
from longspec.drafters.pipeline import Pipeline
from longspec.drafters.sparse_attention import Sparse
from longspec.drafters.suffix import Suffix
from longspec.drafters.token_recycling import Recycle
from longspec.heads import KINDS
from longspec.heads.all_depths import AllDepths
from longspec.heads.eagle3 import Eagle3Head
from longspec.heads.exits import Exits
from longspec.heads.fed import FastMtp
from longspec.heads.format import Trained
from longspec.heads.head import Head as HeadModule
from longspec.heads.one_pass import OnePass
from longspec.heads.published.assistant import MODEL_TYPES
from longspec.heads.published.blocks import MODEL_TYPES as BLOCKS
from longspec.heads.recurrent import Recurrent
from longspec.heads.transfer import Transfer
from longspec.model.load import Model
from longspec.types import Drafter

__all__ = ["DRAFTERS", "DRAFT_TOKENS", "HEADS", "WAYS", "drafter_of", "way_of"]

DRAFT_TOKENS = 15
"""Default limit of a draft's tokens. With the last committed token they fill a tile of 16 token positions: a bf16
forward pass of the default model took 11.7 ms for 1 position and 13.8 ms for 16 (docs/benchmarks/passes.json)."""

DRAFTERS: dict[str, type[Drafter]] = {
    "none": Nothing,
    "ngram": Ngram,
    "lookahead": Lookahead,
    "suffix": Suffix,
    "recycle": Recycle,
    "skip": Skipping,
    "exit": Exit,
    "pipeline": Pipeline,
    "sparse": Sparse,
    "model": DraftModel,
    "mtp": Multitoken,
}


def _names(raw: Mapping[str, Any]) -> str:
    """The head's kind as its config names it (model type and architectures), lower case."""
    return " ".join(
        str(name).lower() for name in (raw.get("speculators_model_type"), *(raw.get("architectures") or ()))
    )


HEADS: dict[type[Drafter], Callable[[Mapping[str, Any]], bool]] = {
    Eagle: lambda raw: "eagle3" in _names(raw),
    PublishedMtp: lambda raw: raw.get("speculators_model_type") == "mtp",
    Blockwise: lambda raw: raw.get("speculators_model_type") in BLOCKS,
    Medusa: lambda raw: "medusa_num_heads" in raw,
    Assisting: lambda raw: raw.get("model_type") in MODEL_TYPES,
}
"""Drafter class by head format of others: the first whose test accepts the folder's config.json is used."""

WAYS: dict[type[HeadModule], type[Drafter]] = {
    Recurrent: Head,
    AllDepths: AtOnce,
    OnePass: Layered,
    Exits: Exit,
    Transfer: HiddenTransfer,
    Eagle3Head: TrainedEagle,
    FastMtp: TrainedMtp,
}
"""Drafter class by the class that a head's module is made from."""


def way_of(kind: str) -> type[Drafter]:
    """The drafter class for a kind of head in KINDS."""
    return next(drafter for module, drafter in WAYS.items() if issubclass(KINDS[kind], module))


def drafter_of(model: Model, head: Trained) -> Drafter:
    """A drafter with a loaded head."""
    make: Any = way_of(head.kind)
    drafter: Drafter = make(model, head)
    return drafter
