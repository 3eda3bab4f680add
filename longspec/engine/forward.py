"""What sessions bring to a pass, and the one flat pass that it makes.

A feed is a chain of tokens that the cache lacks, and behind its last one the draft. First step, full acceptance and
rejection are one case: only the number of lacking tokens differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import cast

import torch
from torch import Tensor

from longspec.cache.stage import Stage
from longspec.engine.session import Session
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.sampling.sampler import choose
from longspec.types import Begun, Draft, Drafter, Reading

__all__ = ["Feed", "Pass", "choices_of", "choosing", "entropies_of", "every", "readers", "run"]


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


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass made of its rows."""

    rows: Rows
    hidden: Tensor  # [r, width], after all layers
    feeds: Sequence[Feed]  # a span of the rows each
    readers: Sequence[Reading]
    features: Mapping[int, Tensor]  # [r, width] each, after so many layers: those that the readers want

    def commit(self, feed: Feed, kept: Sequence[int]) -> None:
        """As `Feed.commit`; then each reader is given the features of the rows that are in the cache now."""
        committed = feed.commit(kept)
        if not committed or not self.readers:
            return
        place = next(i for i, own in enumerate(self.feeds) if own is feed)
        own = {layer: made[self.rows.spans[place].at][committed] for layer, made in self.features.items()}
        for reader in self.readers:
            reader.read(feed.session, torch.cat([own[layer] for layer in reader.layers], -1))


def run(feeds: Sequence[Feed], decoder: Decoder, readers: Sequence[Reading] = ()) -> Pass:
    """All feeds' rows in one pass through all layers. readers: they are given what it computes.

    Rows that a drafter has begun join at the layer that they have reached. As the older rows of a feed are never behind
    the younger ones, those that lack a layer are the last ones of their feeds. (What lies behind them isn't computed
    again: readers get their last state for it.)
    """
    rows = Rows.of([feed.chunk() for feed in feeds], decoder.device)
    read = {layer for reader in readers for layer in reader.layers}
    hidden, features = None, {}
    if all(feed.begun is None for feed in feeds):
        for first, last in pairwise(sorted({0, *read, decoder.config.layers})):
            hidden = decoder.forward(rows, hidden, first, last)
            features[last] = hidden
        assert hidden is not None
        return Pass(rows, hidden, feeds, readers, features)
    layers = [layer for feed in feeds for layer in feed.layers]
    hidden = torch.empty(len(layers), decoder.config.width, dtype=decoder.dtype, device=decoder.device)
    for feed, span in zip(feeds, rows.spans, strict=True):
        if feed.begun is not None:
            hidden[span.at][: len(feed.begun.layers)] = feed.begun.hidden
    for first, last in pairwise(sorted({*layers, *read, decoder.config.layers})):
        chunks = [feed.chunk(sum(layer > first for layer in feed.layers)) for feed in feeds]
        part = Rows.of([chunk for chunk in chunks if chunk.tokens], decoder.device)
        lacking = torch.tensor([layer <= first for layer in layers], device=decoder.device)
        if part.spans:
            hidden[lacking] = decoder.forward(part, hidden[lacking] if first else None, first, last)
        features[last] = hidden.clone() if last in read else hidden
    return Pass(rows, hidden, feeds, readers, features)


def readers(drafters: Iterable[Drafter]) -> list[Reading]:
    """Those that read what the target computes, also where they bet for another."""
    # isinstance would look through the whole protocol, in each step
    return [cast(Reading, drafter) for drafter in every(drafters) if hasattr(drafter, "read")]


def every(drafters: Iterable[Drafter]) -> Iterator[Drafter]:
    """They, and those that bet for them."""
    for drafter in drafters:
        inner: Drafter | None = drafter
        while inner is not None:
            yield inner
            inner = getattr(inner, "inner", None)


def choosing(made: Pass, feeds: Sequence[Feed]) -> Tensor:
    """Hidden states of the rows that choose a token, feeds behind each other; others may follow them in the pass."""
    spans, hidden = made.rows.spans[: len(feeds)], made.hidden
    if all(len(feed.lacking) == 1 for feed in feeds):
        return hidden[: spans[-1].at.stop]
    return torch.cat([hidden[span.at][-feed.choosing :] for span, feed in zip(spans, feeds, strict=True)])


def choices_of(feeds: Sequence[Feed], logits: Tensor) -> list[list[int]]:
    """The target's choice after every choosing row, feed by feed: one copy to the host."""
    chosen, start = [], 0
    for _, alike in groupby(feeds, _manner):
        own = list(alike)
        session, end = own[0].session, start + sum(feed.choosing for feed in own)
        rows, sampling = logits[start:end], session.sampling
        if session.constraint is not None:
            rows = session.constraint.mask(rows, own[0].paths())
        keys = [] if sampling.is_greedy else [key for feed in own for key in feed.session.noise_keys(feed.depths)]
        contexts = [session.seen.union(path) for path in own[0].paths()] if sampling.penalises else None
        chosen.append(choose(rows, sampling, keys, contexts))
        start = end
    flat, ends = torch.cat(chosen).tolist(), list(accumulate(feed.choosing for feed in feeds))
    return [flat[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _manner(feed: Feed) -> tuple[object, ...]:
    """Feeds behind each other that are equal in this choose in one call; one with a text to look at, alone."""
    session, sampling = feed.session, feed.session.sampling
    alone = id(feed) if session.constraint is not None or sampling.penalises else None
    return *sampling.without_seed, alone


def entropies_of(feeds: Sequence[Feed], logits: Tensor) -> list[list[float]]:
    """Nats of every choosing row's distribution, feed by feed."""
    falling = torch.log_softmax(logits.float(), -1)
    values = iter((-(falling.exp() * falling).sum(-1)).tolist())
    return [[next(values) for _ in range(feed.choosing)] for feed in feeds]
