"""What sessions bring to a pass, and the one flat pass that it makes.

A feed is a chain of tokens that the cache lacks, and behind its last one the draft. First step, full acceptance and
rejection are one case: only the number of lacking tokens differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longspec.cache.stage import Stage
from longspec.model.decoder import Rows, Span
from longspec.session import Session
from longspec.types import Draft

__all__ = ["Feed", "lay"]


@dataclass(frozen=True, slots=True)
class Feed:
    """One session's rows in a pass, staged behind its cache."""

    session: Session
    stage: Stage
    staged: slice
    lacking: list[int]  # the text's tokens that the cache doesn't hold
    draft: list[int]
    parents: list[int]  # of the draft, as in `Draft`

    @classmethod
    def of(cls, session: Session, lacking: list[int], draft: Draft | None = None) -> Feed:
        tokens, parents = (draft.tokens.tolist(), draft.parents.tolist()) if draft is not None else ([], [])
        stage, last = session.cache.open(), len(lacking) - 1
        staged = stage.add([*range(-1, last), *(last + 1 + parent for parent in parents)])
        return cls(session, stage, staged, lacking, tokens, parents)

    @property
    def tokens(self) -> list[int]:
        return self.lacking + self.draft

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

    def commit(self, kept: Sequence[int]) -> None:
        """Put into the cache what of this feed is now text: kept draft rows, up to the text's last token but one.

        The last token stays unfed, so that the next step always has a row to begin with. A text that was cut back
        into earlier steps (a stop string) takes its rows along.
        """
        cache, first = self.session.cache, len(self.lacking)
        wanted = len(self.session.tokens) - 1 - cache.length
        if wanted < 0:
            cache.truncate(max(0, cache.length + wanted))
        else:
            rows = [*range(first), *(first + i for i in kept)]
            cache.commit(self.stage, rows[:wanted])


def lay(feeds: Sequence[Feed], device: torch.device) -> Rows:
    """All feeds' rows behind each other: one pass."""
    tokens: list[int] = []
    positions: list[int] = []
    long: list[bool] = []
    spans = []
    for feed in feeds:
        start = len(tokens)
        tokens += feed.tokens
        positions += [feed.session.cache.length + depth for depth in feed.stage.depths[feed.staged]]
        long += [feed.session.long] * (len(tokens) - start)
        spans.append(Span(feed.stage, feed.staged, slice(start, len(tokens))))
    return Rows(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(long, device=device),
        spans,
    )
