"""The drafters, by the names that the command and the engine take.

A new one is a file of its own and a line in `DRAFTERS`; the tests that hold every drafter to losslessness read it.
`model+ngram` is a drafter over a drafter, to any depth: the second bets for the first, which begins with its bets or
lays its own over them. A trained head is named by its folder, or by its kind where one comes with longspec for the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from longspec.drafters.clover import Head
from longspec.drafters.common.merge import over
from longspec.drafters.draft_model import Smaller
from longspec.drafters.eagle3 import Eagle
from longspec.drafters.early_exit import Exit
from longspec.drafters.layer_skip import Skipping, saved_skip
from longspec.drafters.lookahead import Lookahead
from longspec.drafters.medusa import Medusa
from longspec.drafters.ngram import Ngram
from longspec.drafters.none import Nothing
from longspec.drafters.sparse_attention import Sparse
from longspec.drafters.suffix import remembering
from longspec.drafters.token_recycling import Recycle
from longspec.errors import UsageError
from longspec.heads import KINDS
from longspec.heads.eagle3 import load_eagle3
from longspec.heads.format import CONFIG, is_head, load_head, read_about, read_config, shipped
from longspec.heads.medusa import load_medusa
from longspec.model.decoder import Skip
from longspec.model.load import Model
from longspec.types import Drafter

__all__ = ["DRAFTERS", "DRAFT_TOKENS", "STAGED", "Means", "check", "make", "parts", "published"]


DRAFT_TOKENS = 15
"""Tokens drafted at most, if nobody says otherwise: sixteen rows fill a tile (17.2 ms for 15.9), one more costs 22."""


@dataclass(frozen=True, slots=True)
class Means:
    """What drafters are made from."""

    model: Model  # the target
    draft_model: Model | None = None
    skip: Skip | None = None  # what `skip` leaves out for good; else it is searched
    texts: Sequence[Path] = ()  # files that `suffix` drafts from
    remember: bool = False  # and earlier answers, to which new ones are added


DRAFTERS: dict[str, Callable[[Means, Drafter | None], Drafter]] = {
    "none": lambda means, inner: Nothing(),
    "ngram": lambda means, inner: over(Ngram(), inner),
    "lookahead": lambda means, inner: Lookahead(),
    "suffix": lambda means, inner: over(remembering(means.model, means.texts, remember=means.remember), inner),
    "recycle": lambda means, inner: Recycle(means.model.decoder.config.vocabulary, inner),
    "skip": lambda means, inner: Skipping(means.model.decoder, means.skip, inner, start=saved_skip(means.model)),
    "exit": lambda means, inner: Exit(means.model.decoder),
    "sparse": lambda means, inner: Sparse(means.model.decoder, inner=inner),
    "model": lambda means, inner: Smaller(means.model, cast(Model, means.draft_model), inner),
}

STAGED = ("ngram", "suffix", "recycle", "skip", "sparse", "model")
"""Those that take another drafter's bets."""


ALONE = ("none", "lookahead", "exit")
"""Those that bet for no other: nothing, or drafts that are more than bets and must be verified as they are."""


def parts(name: str) -> list[str]:
    """The names of a drafter and of those that bet for it; the name of a folder may have a plus in it."""
    found = []
    while "+" in name and not (Path(name) / CONFIG).is_file():
        first, name = name.split("+", 1)
        found.append(first)
    return [*found, name]


def check(name: str, *, draft_model: bool, memory: bool = False) -> None:
    """Raises UsageError: no drafter has this name, what it needs is missing, or what was given is of no use to it."""
    first, *rest = parts(name)
    for part in (first, *rest):
        if is_head(part):
            if not published(read_config(part)):
                read_about(part)
            continue
        if part == "auto":
            raise UsageError(f"auto isn't put over or under others, as in {name!r}: name them, or use auto alone.")
        if part not in DRAFTERS and part not in KINDS:
            raise UsageError(f"There is no drafter named {part!r}; use auto or one of: {', '.join(DRAFTERS)}; or a "
                             f"trained head: its folder, or {' or '.join(KINDS)} where one comes along.")  # fmt: skip
    for part in (first, *rest)[:-1]:
        if part not in STAGED:
            raise UsageError(f"The drafter {part} takes no other's bets; in {name!r} one of these comes first: "
                             f"{', '.join(STAGED)}.")  # fmt: skip
    if rest and rest[-1] in ALONE:
        raise UsageError(f"The drafter {rest[-1]} bets for no other; name another one behind the + in {name!r}.")
    if "model" in (first, *rest) and not draft_model:
        raise UsageError("The drafter model needs a draft model: name one (--draft-model).")
    if memory and "suffix" not in (first, *rest):
        raise UsageError(f"Texts to draft from (--draft-from, --remember) have no effect with the drafter {name}; "
                         "use suffix or auto, or leave them out.")  # fmt: skip
    if draft_model and "model" not in (first, *rest):
        raise UsageError(f"A draft model has no effect with the drafter {name}; use model, or leave it out.")


def make(name: str, means: Means) -> Drafter:
    """A new drafter, of a name that was checked. Raises UsageError: there is no such head for the model."""
    made: Drafter | None = None
    for part in reversed(parts(name)):
        made = DRAFTERS[part](means, made) if part in DRAFTERS else _trained(part, means.model)
    assert made is not None
    return made


def _trained(name: str, model: Model) -> Drafter:
    """Of a folder, or of a kind that comes with longspec for the model."""
    if name not in KINDS:
        raw = read_config(name)
        if "longspec" not in raw and (kind := published(raw)):
            if kind == "eagle3":
                return Eagle(model, load_eagle3(Path(name), raw, model))
            return Medusa(model, load_medusa(Path(name), raw, model))
        return Head(model, load_head(name, model))
    found = shipped(model)
    if name not in found:
        raise UsageError(f"No {name} head comes with longspec for {model.name}; name the folder of one (--drafter "
                         f"FOLDER), which `longspec train {name}` writes.")  # fmt: skip
    return Head(model, load_head(found[name], model))


def published(raw: Mapping[str, Any]) -> str | None:
    """Which kind of other people's heads a config is of."""
    named = [raw.get("speculators_model_type"), *(raw.get("architectures") or ())]
    if any("eagle3" in str(name).lower() for name in named):
        return "eagle3"
    return "medusa" if "medusa_num_heads" in raw else None
