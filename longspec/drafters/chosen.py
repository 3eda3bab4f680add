"""The drafters of an engine: those that its option names, or those of `auto`, as far as its memory plan holds them.

Takes a loaded target, a name or an object, and the plan's limits; gives drafters by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from longspec.drafters.auto import auto, heads_for
from longspec.drafters.none import Nothing
from longspec.drafters.spec import parse
from longspec.errors import ModelError
from longspec.heads.published.mtp import has_head, lacking
from longspec.model.load import Model
from longspec.types import Drafter

__all__ = ["FREE", "Limits", "chosen"]


class Limits(NamedTuple):
    """What a memory plan leaves for drafters that nobody asked for by name."""

    drafts: bool = True  # any at all
    without: Sequence[str] = ()  # those of `auto` that it has no room for, or parts of them
    tokens: int = 0  # of all texts together
    spare: int | None = None  # bytes for a head; None: no limit

    def holds(self, part: str) -> bool:
        """Whether a drafter that has this part is loaded."""
        return self.drafts and not any(part in name.split("+") for name in self.without)


FREE = Limits()
"""Of an engine without a plan."""


def chosen(
    model: Model, drafter: str | Drafter, options: Mapping[str, Any], limits: Limits
) -> tuple[dict[str, Drafter], str | None]:
    """The drafters by name, in the order in which the control tries them; and what is to be said with the first text of
    a head that `auto` doesn't take.
    """
    if isinstance(drafter, Drafter):
        return {type(drafter).__name__.lower(): drafter}, None
    if drafter != "auto":
        spec = parse(drafter, options)
        return {spec.name: spec.make(model)}, None
    if not limits.drafts:
        return {"none": Nothing()}, None
    heads = heads_for(model, limits.tokens, limits.spare)
    own = model.checkpoint is not None and has_head(model.checkpoint, model.decoder.config)
    nbytes = model.decoder.nbytes if model.decoder.ring is None else 0  # fewer layers are read as slowly as all
    made, remark = {}, _lacking(model)
    for whole in auto(options, nbytes=nbytes, heads=heads, mtp=own):
        if (left := whole.without(limits.without)) is None:
            continue
        try:
            made[left.name] = left.make(model)
        except ModelError as error:
            if left.name != "mtp":
                raise
            remark = str(error)  # of a head that nobody asked for by name
    return made, remark


def _lacking(model: Model) -> str | None:
    """What is to be said of a model whose config names an MTP head that its files lack."""
    lacks = None if model.checkpoint is None else lacking(model.checkpoint, model.decoder.config)
    return None if lacks is None else f"{lacks}; it is drafted for without one"
