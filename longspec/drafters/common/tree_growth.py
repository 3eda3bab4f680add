"""Dynamic draft trees from a cheap model: the expansion loop of `skip`, `sparse`, `model` and the draft heads.

Takes a `Reader`, which runs token positions cheaply, and gives trees. A forward pass expands the most probable leaf of
each tree, all sessions together; the draft is the nodes with the highest path probabilities (as in EAGLE-2,
2406.16858). Candidates are ranked with the session's own sampling parameters and noise, so that a draft agrees with a
sampled target as often as with a greedy one.

With an inner drafter each pass verifies the inner draft on the way, so that a pass adds several tokens (staged
speculation, 2308.04623): the tokens that the reader itself would choose are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from longspec.cache.stage import BLOCK
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.sampling.verify import verify
from longspec.types import Draft, Drafter, Writing

__all__ = ["BREADTH", "FLOOR", "HEAD_BREADTH", "HEAD_FLOOR", "Reader", "grow", "likeliest"]

BREADTH = 3
"""Candidates of an expanded node. Siblings cost a token position each in verification, and no pass of the reader."""

FLOOR = 0.3
"""Least path probability of a leaf that is worth a forward pass of the reader."""

HEAD_BREADTH, HEAD_FLOOR = 6, 0.02
"""The same for trained heads, which expand a node for a hundredth of the target's pass. With a higher floor
drafts of 15 end early."""

ROWS = 4
"""Of a pass with an inner draft, on a CPU: as many as its kernels take at about the price of one. Qwen2.5-Coder-0.5B
in Q4_K_M with 1, 4, 8 and 16 rows: 20.0, 21.3, 24.9 and 41.8 ms (docs/benchmarks/coded_amx.json)."""


class Reader(Protocol):
    """A drafting model, run on token positions behind a session's committed ones."""

    @property
    def decoder(self) -> Decoder: ...

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        """A stage, the committed length before it, and the sequence's tokens that it lacks: at least one."""
        ...

    def forward(self, rows: Rows) -> Tensor:
        """Hidden states [r, width]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [r, V] over the target's vocabulary, or [r, D] over that given to `grow`."""
        ...

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        """Called when the draft is done. rows: of the stage, each a token and its parent row, or -1."""
        ...


@dataclass(slots=True)
class _Plant:
    """One session's draft tree during expansion."""

    session: Writing
    ahead: Sequence[int]
    limit: int
    deepest: int  # nodes of this depth aren't expanded
    breadth: int
    floor: float
    stage: Any
    length: int  # committed positions before the stage
    coming: list[int]  # tokens of the next pass
    continued: list[int]  # their parent rows in the stage
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)  # nodes that aren't expanded
    at: int = -1  # the node being expanded; -1 is the root, the last committed token
    over: Callable[[Sequence[int]], bool] | None = None  # as `grow` takes it
    inner: Draft | None = None
    staged: slice = field(default_factory=lambda: slice(0, 0))  # rows of the current pass
    rows: list[tuple[int, int]] = field(default_factory=list)  # of the stage: token, and parent row or -1
    row_of: dict[int, int] = field(default_factory=dict)  # node to its row in the stage

    def path(self, node: int) -> list[int]:
        path = []
        while node >= 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return [*self.ahead, *path[::-1]]

    def depth(self, node: int) -> int:
        return len(self.path(node)) - len(self.ahead)

    @property
    def choosing(self) -> int:
        """Number of rows at the end of the pass whose logits are needed: the expanded node's and the inner draft's."""
        return 1 + (len(self.inner) if self.inner is not None else 0)

    def paths(self) -> list[list[int]]:
        """The assumed and drafted tokens up to each of these rows."""
        paths = [self.path(self.at)]
        if self.inner is not None:
            for token, parent in zip(self.inner.tokens.tolist(), self.inner.parents.tolist(), strict=True):
                paths.append([*paths[parent + 1], token])
        return paths

    def take(self, ranked: list[list[int]], probs: list[list[float]]) -> None:
        """Add the candidates of these rows as nodes, best first; rows of rejected inner draft tokens are ignored."""
        last = self.staged.stop - self.choosing  # the row of the expanded node
        kept: Sequence[int] = ()
        if self.inner is not None:
            choices = [row[0] for row in ranked]
            kept = verify(self.inner.tokens.tolist(), self.inner.parents.tolist(), choices).kept
        at, row = self.at, 0
        for following in (*kept, None):
            self.row_of[at] = last + row
            base = self.probs[at] if at >= 0 else 1.0
            first = len(self.tokens)
            self.tokens += ranked[row]
            self.parents += [at] * len(ranked[row])
            self.probs += [base * chance for chance in probs[row]]
            self.leaves += range(first, len(self.tokens))
            if following is not None:  # the best candidate was in the inner draft: it is expanded already
                self.leaves.remove(first)
                at, row = first, following + 1

    def choose_next(self) -> bool:
        """Choose the leaf to expand in the next pass; False if none is worth a pass."""
        self.leaves.sort(key=lambda leaf: -self.probs[leaf])
        best = next((leaf for leaf in self.leaves if self.depth(leaf) < self.deepest), None)
        if best is None or self.probs[best] < self.floor:
            return False
        if self.over is not None and self._ends(best):
            return False
        better = sum(chance >= self.probs[best] for chance in self.probs)
        if better - 1 >= self.limit:  # its children would not be among the `limit` best nodes
            return False
        self.leaves.remove(best)
        self.at = best
        self.coming, self.continued = [self.tokens[best]], [self.row_of[self.parents[best]]]
        return True

    def draft(self) -> Draft:
        """The best nodes; or a chain up to its end, without probabilities by which it could be cut."""
        found = likeliest(self.tokens, self.parents, self.probs, self.limit)
        if self.over is None:
            return found
        tokens = found.tokens.tolist()
        count = next((n for n in range(1, len(tokens)) if self.over(tokens[:n])), len(tokens))
        return Draft.chain(tokens[:count])

    def _ends(self, node: int) -> bool:
        """Whether the chain is over at this node, or, as an inner draft brings several nodes, before it."""
        path = self.path(node)[len(self.ahead) :]
        return self.over is not None and any(self.over(path[:n]) for n in range(1, len(path) + 1))


def likeliest(tokens: Sequence[int], parents: Sequence[int], probs: Sequence[float], limit: int) -> Draft:
    """The `limit` most probable nodes as a draft. A child is never more probable than its parent, and follows it."""
    order = sorted(range(len(tokens)), key=lambda node: (-probs[node], node))[:limit]
    place = {-1: -1} | {node: i for i, node in enumerate(order)}
    return Draft.tree(
        [tokens[node] for node in order], [place[parents[node]] for node in order], [probs[node] for node in order]
    )


@torch.inference_mode()
def grow(
    reader: Reader,
    sessions: Sequence[Writing],
    limits: Sequence[int],
    ahead: Sequence[Sequence[int]] | None = None,
    *,
    inner: Drafter | None = None,
    depth: int | None = None,
    vocabulary: Tensor | None = None,
    of_head: bool = False,
    breadth: int | None = None,
    over: Callable[[Sequence[int]], bool] | None = None,
) -> list[Draft]:
    """A draft for each session. inner: a drafter whose drafts the reader verifies. of_head: the reader is a head.
    breadth: candidates of an expanded node, if not the usual number; 1 makes chains. over: whether drafted tokens
    end a step; drafts are then chains up to there, however improbable.

    ahead: assumed tokens of each session, behind which its draft begins. depth: depth limit of the tree, if the reader
    has one. vocabulary: [D], the tokens of the reader's logits; default: all of the target's.
    """
    drafts = [Draft.chain(()) for _ in sessions]
    plants: dict[int, _Plant] = {}
    usual, floor = (HEAD_BREADTH, HEAD_FLOOR) if of_head else (BREADTH, FLOOR)
    breadth, floor = (1, 0.0) if over is not None else (breadth or usual, floor)
    for i, (session, limit) in enumerate(zip(sessions, limits, strict=True)):
        if limit > 0:
            guess = ahead[i] if ahead else ()
            stage, length, lacking = reader.open(session)
            coming = [*lacking, *guess]
            deepest, continued = min(limit, depth or limit), list(range(-1, len(coming) - 1))
            plants[i] = _Plant(
                session, guess, limit, deepest, breadth, floor, stage, length, coming, continued, over=over
            )
    growing = list(plants.values())
    while growing:
        _pass(reader, growing, inner, vocabulary)
        growing = [plant for plant in growing if plant.choose_next()]
    for i, plant in plants.items():
        reader.grown(plant.session, plant.stage, plant.rows)
        drafts[i] = plant.draft()
    return drafts


def _pass(reader: Reader, plants: Sequence[_Plant], inner: Drafter | None, vocabulary: Tensor | None) -> None:
    if inner is not None:
        most = ROWS if reader.decoder.device.type == "cpu" else BLOCK
        rooms = [max(0, min(plant.deepest - plant.depth(plant.at) - 1, most - len(plant.coming))) for plant in plants]
        guesses = [plant.path(plant.at) for plant in plants]
        bets = inner.propose([plant.session for plant in plants], rooms, guesses)
        for plant, bet in zip(plants, bets, strict=True):
            plant.inner = bet if len(bet) else None
    chunks = []
    for plant in plants:
        if plant.inner is not None:
            last = len(plant.rows) + len(plant.coming) - 1
            plant.coming += plant.inner.tokens.tolist()
            plant.continued += [last + 1 + parent for parent in plant.inner.parents.tolist()]
        plant.staged = plant.stage.add(plant.continued)
        plant.rows += zip(plant.coming, plant.continued, strict=True)
        chunks.append(Chunk(plant.stage, plant.staged, plant.coming, plant.length, plant.session.long))
    rows = Rows.of(chunks, reader.decoder.device)
    hidden = reader.forward(rows)
    choosing = torch.cat([hidden[span.at][-plant.choosing :] for span, plant in zip(rows.spans, plants, strict=True)])
    logits = reader.logits(choosing)
    start = 0
    for plant in plants:
        own = logits[start : start + plant.choosing]
        tokens, probs = plant.session.rank(own, plant.paths(), plant.breadth, vocabulary)
        start += plant.choosing
        plant.take(tokens.tolist(), probs.tolist())
