"""What a session brings to a forward pass: a chain of tokens that its cache lacks, and the draft that follows them.

First step, full acceptance and rejection are one case: only the number of lacking tokens differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from longspec.cache.stage import Stage
from longspec.engine.session import Session
from longspec.model.decoder import Chunk
from longspec.types import Begun, Draft, Verdict

__all__ = ["Input"]


@dataclass(frozen=True, slots=True)
class Input:
    """One session's token positions in a pass, staged behind its cached ones."""

    session: Session
    stage: Stage
    staged: slice
    lacking: list[int]  # committed tokens that the cache doesn't hold
    draft: list[int]
    parents: list[int]  # parents[i] of the draft's token i, as in `Draft`
    begun: Begun | None = None
    whole: bool = False  # as the draft says
    probs: list[float] | None = None  # [n]: the drafter's
    nodes: Sequence[int] | None = None  # those of the draft as it was proposed, where some have left

    @classmethod
    def of(cls, session: Session, lacking: list[int], draft: Draft | None = None) -> Input:
        """Stage a session's lacking tokens and the draft that follows them."""
        tokens, parents = (draft.tokens.tolist(), draft.parents.tolist()) if draft is not None else ([], [])
        begun, last = (draft.begun if draft is not None else None), len(lacking) - 1
        stage, done = (session.cache.open(), 0) if begun is None else (begun.stage, len(begun.layers))
        staged = stage.add([*range(-1, last), *(last + 1 + parent for parent in parents)][done:])
        made = cls(session, stage, slice(0, staged.stop), lacking, tokens, parents, begun)
        if draft is None or (draft.probs is None and not draft.whole):
            return made
        return replace(made, whole=draft.whole, probs=None if draft.probs is None else draft.probs.tolist())

    @property
    def may_shrink(self) -> bool:
        """Whether nodes of its draft may leave in the middle of a pass."""
        keeps = type(self.stage).keep is not Stage.keep
        return bool(self.draft) and not self.whole and self.begun is None and keeps

    def shrunk(self, nodes: Sequence[int]) -> Input:
        """It with these nodes of its draft alone, each with its parent, in its stage too."""
        first, places = len(self.lacking), {-1: -1} | {node: i for i, node in enumerate(nodes)}
        self.stage.keep([*range(first), *(first + node for node in nodes)])
        return replace(
            self,
            staged=slice(0, first + len(nodes)),
            draft=[self.draft[node] for node in nodes],
            parents=[places[self.parents[node]] for node in nodes],
            probs=None if self.probs is None else [self.probs[node] for node in nodes],
            nodes=nodes,
        )

    def proposed(self, verdict: Verdict) -> Verdict:
        """A verdict on it as one on the draft that was proposed, without the choices behind nodes that have left."""
        nodes = self.nodes
        return verdict if nodes is None else replace(verdict, kept=tuple(nodes[i] for i in verdict.kept), choices=())

    @property
    def tokens(self) -> list[int]:
        return self.lacking + self.draft

    @property
    def layers(self) -> list[int]:
        """For each position, the number of layers that a drafter has already run."""
        begun = self.begun.layers if self.begun is not None else ()
        return [*begun, *[0] * (len(self.tokens) - len(begun))]

    def chunk(self, first: int = 0) -> Chunk:
        """The positions from index `first` on, as the decoder takes them."""
        session = self.session
        staged = slice(first, self.staged.stop)
        return Chunk(self.stage, staged, self.tokens[first:], session.cache.length, session.long)

    @property
    def choosing(self) -> int:
        """The number of positions that choose a token: the last lacking one and every drafted one."""
        return 1 + len(self.draft)

    @property
    def depths(self) -> list[int]:
        """For each choosing position, the number of draft tokens from the root to it."""
        first = len(self.lacking) - 1
        return [depth - first for depth in self.stage.depths[first:]]

    def paths(self) -> list[list[int]]:
        """For each choosing position, the draft tokens from the root to it."""
        paths: list[list[int]] = [[]]
        for token, parent in zip(self.draft, self.parents, strict=True):
            paths.append([*paths[parent + 1], token])
        return paths

    def commit(self, kept: Sequence[int]) -> list[int]:
        """Commit the lacking tokens and the kept draft tokens, up to the sequence's last token but one, to the cache.

        Returns the committed positions' indices within the input.

        The last token stays uncached, so that the next step always has a position to begin with. A sequence that a
        stop string cut back into earlier steps truncates its cache as well.
        """
        cache, first = self.session.cache, len(self.lacking)
        wanted = len(self.session.tokens) - 1 - cache.length
        if wanted < 0:
            cache.truncate(max(0, cache.length + wanted))
            return []
        rows = [*range(first), *(first + i for i in kept)][:wanted]
        cache.commit(self.stage, rows)
        return rows
