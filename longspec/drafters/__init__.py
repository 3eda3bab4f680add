"""The drafters, by the names that the command and the engine take.

A new one is a file of its own with a subclass of `longspec.types.Drafter`, and a line in `DRAFTERS`; the tests that
hold every drafter to losslessness read it. Other packages add drafters by the entry point `longspec.drafters`
(`longspec.drafters.spec`). A head that was trained for a model is named by its folder, or by its kind where one comes
with longspec; its format is a line in `HEADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from longspec.drafters.clover import Head
from longspec.drafters.draft_model import DraftModel
from longspec.drafters.eagle3 import Eagle
from longspec.drafters.early_exit import Exit
from longspec.drafters.layer_skip import Skipping
from longspec.drafters.lookahead import Lookahead
from longspec.drafters.medusa import Medusa
from longspec.drafters.ngram import Ngram
from longspec.drafters.none import Nothing
from longspec.drafters.sparse_attention import Sparse
from longspec.drafters.suffix import Suffix
from longspec.drafters.token_recycling import Recycle
from longspec.types import Drafter

__all__ = ["DRAFTERS", "DRAFT_TOKENS", "HEADS"]

DRAFT_TOKENS = 15
"""Tokens of a draft at most, if nobody says otherwise: with the text's own they fill a tile of sixteen positions, which
took 17.2 ms of a bf16 pass of the default model where one took 15.9, and seventeen 22 (docs/benchmarks/passes.json)."""

DRAFTERS: dict[str, type[Drafter]] = {
    "none": Nothing,
    "ngram": Ngram,
    "lookahead": Lookahead,
    "suffix": Suffix,
    "recycle": Recycle,
    "skip": Skipping,
    "exit": Exit,
    "sparse": Sparse,
    "model": DraftModel,
}


def _names(raw: Mapping[str, Any]) -> str:
    """What a head's config calls its kind, in small letters."""
    return " ".join(
        str(name).lower() for name in (raw.get("speculators_model_type"), *(raw.get("architectures") or ()))
    )


HEADS: dict[type[Drafter], Callable[[Mapping[str, Any]], bool]] = {
    Head: lambda raw: "longspec" in raw,
    Eagle: lambda raw: "eagle3" in _names(raw),
    Medusa: lambda raw: "medusa_num_heads" in raw,
}
"""Who drafts with a head's folder: the first that knows its config.json."""
