"""The drafters, by the names that the command and the engine take.

A new one is a file of its own and a line in `DRAFTERS`; the tests that hold every drafter to losslessness read it.
`model+ngram` is a drafter over a drafter: the second bets for the first, to any depth. A trained head is named by its
folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from longspec.drafters.exit import Exit
from longspec.drafters.head import Head
from longspec.drafters.ngram import Ngram
from longspec.drafters.none import Nothing
from longspec.drafters.skip import Skipping, saved_skip
from longspec.drafters.smaller import Smaller
from longspec.drafters.sparse import Sparse
from longspec.errors import UsageError
from longspec.heads import KINDS
from longspec.heads.format import is_head, load_head, read_about
from longspec.model.decoder import Skip
from longspec.model.load import Model
from longspec.types import Drafter

__all__ = ["DRAFTERS", "STAGED", "Means", "check", "make"]


@dataclass(frozen=True, slots=True)
class Means:
    """What drafters are made from."""

    model: Model  # the target
    draft_model: Model | None = None
    skip: Skip | None = None  # what `skip` leaves out for good; else it is searched


DRAFTERS: dict[str, Callable[[Means, Drafter | None], Drafter]] = {
    "none": lambda means, inner: Nothing(),
    "ngram": lambda means, inner: Ngram(),
    "skip": lambda means, inner: Skipping(means.model.decoder, means.skip, inner, start=saved_skip(means.model)),
    "exit": lambda means, inner: Exit(means.model.decoder),
    "sparse": lambda means, inner: Sparse(means.model.decoder, inner=inner),
    "model": lambda means, inner: Smaller(means.model, cast(Model, means.draft_model), inner),
}

STAGED = ("skip", "sparse", "model")
"""Those that take another drafter's bets."""


def check(name: str, *, draft_model: bool) -> None:
    """Raises UsageError: no drafter has this name, or a draft model is missing or of no use."""
    if name in KINDS:
        raise UsageError(f"No {name} head comes with longspec for a model; name the folder of one (--drafter FOLDER), "
                         f"which `longspec train {name}` writes.")  # fmt: skip
    if is_head(name):
        read_about(name)
    first, *rest = ["none"] if is_head(name) else name.split("+")
    for part in (first, *rest):
        if part not in DRAFTERS:
            raise UsageError(f"There is no drafter named {part!r}; use auto or one of: {', '.join(DRAFTERS)}.")
    for part in (first, *rest)[:-1]:
        if part not in STAGED:
            raise UsageError(f"The drafter {part} takes no other's bets; in {name!r} one of these comes first: "
                             f"{', '.join(STAGED)}.")  # fmt: skip
    if "model" in (first, *rest) and not draft_model:
        raise UsageError("The drafter model needs a draft model: name one (--draft-model).")
    if draft_model and "model" not in (first, *rest):
        raise UsageError(f"A draft model has no effect with the drafter {name}; use model, or leave it out.")


def make(name: str, means: Means) -> Drafter:
    """A new drafter.

    Raises:
        UsageError: no drafter has this name, or something that it needs wasn't given.
    """
    check(name, draft_model=means.draft_model is not None)
    if is_head(name):
        return Head(means.model, load_head(name, means.model))
    made: Drafter | None = None
    for part in reversed(name.split("+")):
        made = DRAFTERS[part](means, made)
    assert made is not None
    return made
