"""What sessions bring to a pass, and the one flat pass that it makes.

A feed is a chain of tokens that the cache lacks, and behind its last one the draft. First step, full acceptance and
rejection are one case: only the number of lacking tokens differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longspec.cache.stage import Stage
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.session import Session
from longspec.types import Begun, Draft

__all__ = ["Feed", "choosing", "entropies_of", "run"]


@dataclass(frozen=True, slots=True)
class Feed:
    """One session's rows in a pass, staged behind its cache."""

    session: Session
    stage: Stage
    staged: slice
    lacking: list[int]  # the text's tokens that the cache doesn't hold
    draft: list[int]
    parents: list[int]  # of the draft, as in `Draft`
    begun: Begun | None = None

    @classmethod
    def of(cls, session: Session, lacking: list[int], draft: Draft | None = None) -> Feed:
        tokens, parents = (draft.tokens.tolist(), draft.parents.tolist()) if draft is not None else ([], [])
        begun, last = (draft.begun if draft is not None else None), len(lacking) - 1
        stage, done = (session.cache.open(), 0) if begun is None else (begun.stage, len(begun.layers))
        staged = stage.add([*range(-1, last), *(last + 1 + parent for parent in parents)][done:])
        return cls(session, stage, slice(0, staged.stop), lacking, tokens, parents, begun)

    @property
    def tokens(self) -> list[int]:
        return self.lacking + self.draft

    @property
    def layers(self) -> list[int]:
        """How many layers each row has behind it."""
        begun = self.begun.layers if self.begun is not None else ()
        return [*begun, *[0] * (len(self.tokens) - len(begun))]

    def chunk(self, first: int = 0) -> Chunk:
        """The rows from the `first`-th on, as a pass takes them."""
        session = self.session
        staged = slice(first, self.staged.stop)
        return Chunk(self.stage, staged, self.tokens[first:], session.cache.length, session.long)

    @property
    def choosing(self) -> int:
        """How many rows choose a token: the text's last, and every draft row."""
        return 1 + len(self.draft)

    @property
    def depths(self) -> list[int]:
        """Of the choosing rows: how many draft tokens lie between the text and the token that is chosen."""
        first = len(self.lacking) - 1
        return [depth - first for depth in self.stage.depths[first:]]

    def paths(self) -> list[list[int]]:
        """Of the choosing rows: the draft tokens on their path."""
        paths: list[list[int]] = [[]]
        for token, parent in zip(self.draft, self.parents, strict=True):
            paths.append([*paths[parent + 1], token])
        return paths

    def commit(self, kept: Sequence[int]) -> list[int]:
        """Put into the cache what of this feed is now text: kept draft rows, up to the text's last token but one.

        Gives the rows that it put there.

        The last token stays unfed, so that the next step always has a row to begin with. A text that was cut back
        into earlier steps (a stop string) takes its rows along.
        """
        cache, first = self.session.cache, len(self.lacking)
        wanted = len(self.session.tokens) - 1 - cache.length
        if wanted < 0:
            cache.truncate(max(0, cache.length + wanted))
            return []
        rows = [*range(first), *(first + i for i in kept)][:wanted]
        cache.commit(self.stage, rows)
        return rows


def run(feeds: Sequence[Feed], decoder: Decoder) -> tuple[Rows, Tensor]:
    """All feeds' rows in one pass through all layers, and their hidden states [r, width].

    Rows that a drafter has begun join at the layer that they have reached. As the older rows of a feed are never behind
    the younger ones, those that lack a layer are the last ones of their feeds.
    """
    rows = Rows.of([feed.chunk() for feed in feeds], decoder.device)
    if all(feed.begun is None for feed in feeds):
        return rows, decoder.forward(rows)
    layers = [layer for feed in feeds for layer in feed.layers]
    hidden = torch.empty(len(layers), decoder.config.width, dtype=decoder.dtype, device=decoder.device)
    for feed, span in zip(feeds, rows.spans, strict=True):
        if feed.begun is not None:
            hidden[span.at][: len(feed.begun.layers)] = feed.begun.hidden
    reached = sorted({*layers, decoder.config.layers})
    for first, last in pairwise(reached):
        chunks = [feed.chunk(sum(layer > first for layer in feed.layers)) for feed in feeds]
        part = Rows.of([chunk for chunk in chunks if chunk.tokens], decoder.device)
        lacking = torch.tensor([layer <= first for layer in layers], device=decoder.device)
        hidden[lacking] = decoder.forward(part, hidden[lacking] if first else None, first, last)
    return rows, hidden


def choosing(hidden: Tensor, rows: Rows, feeds: Sequence[Feed]) -> Tensor:
    """Hidden states of the rows that choose a token, feeds behind each other."""
    if all(len(feed.lacking) == 1 for feed in feeds):
        return hidden
    return torch.cat([hidden[span.at][-feed.choosing :] for span, feed in zip(rows.spans, feeds, strict=True)])


def entropies_of(feeds: Sequence[Feed], logits: Tensor) -> list[list[float]]:
    """Nats of every choosing row's distribution, feed by feed."""
    falling = torch.log_softmax(logits.float(), -1)
    values = iter((-(falling.exp() * falling).sum(-1)).tolist())
    return [[next(values) for _ in range(feed.choosing)] for feed in feeds]
