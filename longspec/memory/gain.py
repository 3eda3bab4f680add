"""How a run may draft under a plan: which drafters, how many tokens, how many texts side by side; and what that brings.

Takes a request; gives its candidates, the one of most tokens per second first, by which a plan chooses among those
that fit (SpecMemo, 2506.01986). Nothing is measured here: a plan must not change from call to call, and what drafts
bring on a text is found by control, while it is written. So a candidate's gain is a rule of thumb, for comparing.

    a draft of m tokens, each kept with probability a behind a kept one, brings 1 + a + ... + a^m tokens
    texts differ more than drafters do, so that a is spread over what Spec-Bench's categories show (_KEPT)
    a pass of r rows takes what it reads, times 1 + _ROW (r - 1); a token drafted by a head or a model takes what its
    weights are of the target's; control drafts as many of the tokens that it may as pay
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from longspec.drafters import DRAFT_TOKENS, HEADS, WAYS
from longspec.drafters.draft_model import DraftModel
from longspec.drafters.early_exit import Exit
from longspec.drafters.heads.mtp import Multitoken
from longspec.drafters.layer_skip import Skipping
from longspec.drafters.pipeline import Pipeline
from longspec.drafters.sparse_attention import Sparse
from longspec.drafters.spec import Spec
from longspec.drafters.token_recycling import Recycle
from longspec.model.reads import Reads
from longspec.types import Drafter

if TYPE_CHECKING:
    from longspec.memory.choices import Request

__all__ = ["DRAFTS", "How", "Taken", "hows", "taken", "whole"]

DRAFTS = (8, 4, 2)
"""Drafted tokens to try where those asked for don't fit: the logits of a tree are its memory."""

_KEPT = {
    "text": (0.1, 0.3, 0.5, 0.7, 0.9),  # what the text holds already: 1.3 tokens a step in stories, 3 in summaries
    "head": (0.3, 0.45, 0.6, 0.75, 0.92),
    "model": (0.5, 0.6, 0.7, 0.8, 0.93),
}
_HEADS = frozenset[type[Drafter]]((Multitoken, *HEADS, *WAYS.values())) - {Exit}
_SELVES = frozenset[type[Drafter]]((Skipping, Exit, Sparse, Pipeline))
_SELF = 0.6  # of a pass: a token that the target drafts for itself
_ROW, _STREAMED_ROW = 0.04, 0.002  # of a pass: a further row of one that reads memory, and of one that reads the disk
_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 15, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class Taken:
    """A drafter, and the bytes that it takes."""

    spec: Spec
    once: int  # its weights and tables
    text: int  # for each text

    @property
    def kind(self) -> str:
        """The row of _KEPT."""
        if DraftModel in self.spec.kinds:
            return "model"
        return "text" if _HEADS.isdisjoint(self.spec.kinds) else "head"

    def cost(self, plain: float) -> float:
        """Of a drafted token, in plain passes, which read so many bytes."""
        if self.kind != "text":
            return self.once / plain
        return 0.0 if _SELVES.isdisjoint(self.spec.kinds) else _SELF


@dataclass(frozen=True, slots=True)
class How:
    """How a run drafts."""

    drafters: tuple[Taken, ...]
    draft_tokens: int
    texts: int
    gain: float  # tokens, of all texts, in the time of a plain pass of one
    without: tuple[str, ...] = ()  # the names of drafters that are left out

    @property
    def nbytes(self) -> int:
        """Bytes of the drafters."""
        return sum(each.once + each.text * self.texts for each in self.drafters)


def taken(request: Request) -> tuple[Taken, ...]:
    """The request's drafters and their bytes; a draft model's files are opened for it."""
    return tuple(_counted(request, spec) for spec in request.drafters)


def _counted(request: Request, spec: Spec) -> Taken:
    once = spec.planned_bytes(replace(request, texts=0))
    return Taken(spec, once, spec.planned_bytes(replace(request, texts=1)) - once)


def whole(request: Request, drafters: Sequence[Taken]) -> How:
    """As it was asked for."""
    r = request
    return How(tuple(drafters), r.draft_tokens, r.texts, gain(r.footprint.reads, drafters, r.draft_tokens, r.texts))


def hows(request: Request, drafters: Sequence[Taken], most: int, *, streams: bool) -> list[How]:
    """The candidates, the one of most tokens per second first; of equal ones, the one that drafts with more. most:
    tokens of a draft. streams: passes read weights from disk.
    """
    made = []
    for texts in _widths(request.texts):
        for some, tokens, without in _drafting(request, drafters, most):
            made.append(
                How(some, tokens, texts, gain(request.footprint.reads, some, tokens, texts, streams=streams), without)
            )
    return sorted(made, key=lambda how: -how.gain)


def _widths(texts: int) -> Iterator[int]:
    """Texts side by side: as many as were asked for, then half of them, and so on."""
    while texts:
        yield texts
        texts //= 2


def _drafting(
    request: Request, drafters: Sequence[Taken], most: int
) -> Iterator[tuple[tuple[Taken, ...], int, tuple[str, ...]]]:
    """Drafters, tokens, and what is left out. Those that nobody asked for by name may be: the ones with weights first,
    then a table of the vocabulary's size above n-grams: on 26 first turns of Spec-Bench they were as fast without it.
    """
    ways: list[tuple[tuple[Taken, ...], tuple[str, ...]]] = [(tuple(drafters), ())]
    light = [each for each in drafters if each.kind == "text"]
    if request.may_drop and light:
        heavy = tuple(each.spec.name for each in drafters if each.kind != "text")
        ways += [(tuple(light), heavy)] if heavy else []
        if any(map(_has_table, light)):
            bare = [_counted(request, Spec(each.spec.parts[1:])) if _has_table(each) else each for each in light]
            ways.append((tuple(bare), (*heavy, "recycle")))
    for these, without in ways:
        yield from ((these, n, without) for n in (most, *(few for few in (DRAFT_TOKENS, *DRAFTS) if few < most)))
    if request.may_drop and most:
        yield (), 0, tuple(each.spec.name for each in drafters)


def _has_table(each: Taken) -> bool:
    """Whether another drafter is left without its table."""
    return each.spec.parts[0].kind is Recycle and len(each.spec.parts) > 1


def gain(reads: Reads, drafters: Sequence[Taken], most: int, texts: int, *, streams: bool = False) -> float:
    """Tokens of all texts in the time of a plain pass of one, by the best of the drafters."""
    row, plain = _STREAMED_ROW if streams else _ROW, reads.by_rows(1)

    def rate(kept: float, cost: float, tokens: int) -> float:
        rows = texts * (1 + tokens)
        seconds = reads.by_rows(rows) / plain * (1 + row * (rows - 1)) + cost * tokens
        return texts * sum(kept**i for i in range(tokens + 1)) / seconds

    best = rate(0.0, 0.0, 0)
    lengths = [tokens for tokens in _LENGTHS if tokens < most] + [most]
    for each in drafters:
        spread = _KEPT[each.kind]
        cost = each.cost(plain)
        best = max(best, sum(max(rate(kept, cost, tokens) for tokens in lengths) for kept in spread) / len(spread))
    return best
