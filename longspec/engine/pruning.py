"""Pruning in the middle of a pass: drafted rows that will hardly be kept leave before the later layers run (Lever,
2605.16786).

Takes the hidden states of a pass after two thirds of its layers; gives the nodes of each draft that go on. A node that
leaves is one that was never drafted: the text can't change, and the worst is a token that would have been kept.

A node's chance is its parent's times what a logistic regression says of three numbers: how far the node's token stands
out, in the parent's hidden state read out by the head, from tokens in general; how far from the best of the draft's
tokens there; and what its drafter thinks of it. The regression is fitted to the verdicts as they come, so that it needs
no training and is the model's own. It begins when it has seen enough, leaves out only what has next to no chance, and
lets every eighth step pass whole: where more than a fiftieth of what was kept there would have left, the bound falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspec.engine.input import Input
from longspec.model.decoder import Decoder
from longspec.types import Verdict

__all__ = ["Pruner"]

_PLACE = 2 / 3  # of the layers that run before
_LEAST = 0.02  # chance below which a node leaves, at first
_LOST = 0.02  # of kept nodes, that may have left
_SEEN = 150  # labelled nodes, and a fifth of them kept and a fifth not, before anything leaves
_WHOLE = 8  # steps, of which one stays whole
_REFERENCE = 128  # tokens that stand for all
_PRIOR = (-1.0, 0.5, 0.2, 0.5, 0.0)  # weights to begin with: of 1 and the four features


@dataclass(slots=True)
class Pruner:
    """The regression, and what it has done."""

    decoder: Decoder
    layer: int = 0
    rows: int = 0  # that left
    seen: int = 0  # of drafts that it has looked at
    steps: int = 0
    least: float = 0.0  # the chance below which a node leaves
    kept: int = 0  # nodes, of steps that stayed whole
    lost: int = 0  # of these, that would have left
    leaving: int = 0  # nodes of such steps that would have left
    _weights: Tensor = field(default_factory=lambda: torch.tensor(_PRIOR, dtype=torch.float64))
    _moments: Tensor = field(default_factory=lambda: torch.eye(len(_PRIOR), dtype=torch.float64) * 4)
    _labels: list[int] = field(default_factory=lambda: [0, 0])
    _reference: Tensor | None = None
    _features: list[Tensor | None] = field(default_factory=list)  # of this pass's drafts
    _staying: list[set[int]] = field(default_factory=list)  # of a step that stays whole

    def __post_init__(self) -> None:
        self.layer, self.least = round(self.decoder.config.layers * _PLACE), _LEAST

    def prune(self, inputs: Sequence[Input], hidden: Tensor) -> tuple[list[Input], list[int] | None]:
        """The inputs without the nodes that leave, and where the rows stand that go on; None where all do."""
        self.steps += 1
        whole = self.steps % _WHOLE == 0
        self._features, self._staying, made, at, start = [], [], [], [], 0
        for one in inputs:
            count = len(one.tokens)
            own = hidden[start : start + count]
            features = self._of(one, own) if one.may_shrink else None
            self._features.append(features)
            self.seen += len(one.draft)
            nodes = [*range(len(one.draft))] if features is None else self._likely(one, features)
            if whole:
                self._staying.append({*nodes})
            elif len(nodes) < len(one.draft):
                one = one.shrunk(nodes)
            made.append(one)
            first, going = start + len(one.lacking), range(len(one.draft)) if one.nodes is None else one.nodes
            at += [*range(start, first), *(first + node for node in going)]
            start += count
        self.rows += start - len(at)
        return made, (at if len(at) < start else None)

    def observe(self, inputs: Sequence[Input], verdicts: Sequence[Verdict]) -> None:
        """Learn from the verdicts on this pass's choosing inputs, which `prune` has made."""
        for i, (one, verdict, features) in enumerate(zip(inputs, verdicts, self._features, strict=False)):
            if features is None:
                continue
            if self._staying:
                self._compare(self._staying[i], verdict.kept, len(one.draft))
            reached = {-1, *verdict.kept}
            nodes = range(len(one.draft)) if one.nodes is None else one.nodes
            for place, (node, parent) in enumerate(zip(nodes, one.parents, strict=True)):
                if parent in reached:
                    self._learn(features[node], kept=place in verdict.kept)

    def _of(self, one: Input, hidden: Tensor) -> Tensor:
        """Features [n, 5] of the draft's nodes."""
        first = len(one.lacking) - 1
        parents = torch.tensor(one.parents) + 1 + first
        tokens = torch.tensor(one.draft)
        if self._reference is None:
            size = self.decoder.config.vocabulary
            self._reference = self.decoder.readout(torch.arange(_REFERENCE) * (size // _REFERENCE))
        distinct, place = torch.unique(tokens, return_inverse=True)
        states = self.decoder.normed(hidden[first:]).float()
        usual = states @ self._reference.T
        drafted = (states @ self.decoder.readout(distinct).T - usual.mean(1, keepdim=True)) / usual.std(1, keepdim=True)
        own = drafted[parents - first, place]
        best = drafted[parents - first].amax(1)
        probs = None if one.probs is None else torch.tensor(one.probs).clamp(1e-4, 1 - 1e-4)
        thought = torch.zeros(len(tokens)) if probs is None else torch.logit(probs)
        known = torch.full((len(tokens),), float(probs is not None))
        return torch.stack((torch.ones(len(tokens)), own, own - best, thought, known), 1).double()

    def _compare(self, staying: set[int], kept: Sequence[int], count: int) -> None:
        """Count what would have left, and lower the bound where too much of it was kept."""
        self.kept += len(kept)
        self.lost += sum(node not in staying for node in kept)
        self.leaving += count - len(staying)
        if self.lost > 1 + _LOST * self.kept:
            self.least, self.kept, self.lost = self.least / 2, 0, 0

    def _likely(self, one: Input, features: Tensor) -> list[int]:
        """The nodes whose chance isn't too low, each with its parent."""
        if min(self._labels) < _SEEN // 5 or sum(self._labels) < _SEEN:
            return [*range(len(one.draft))]
        chances: list[float] = torch.sigmoid(features @ self._weights).tolist()
        paths, staying = {-1: 1.0}, []
        for node, parent in enumerate(one.parents):
            path = paths.get(parent, 0.0) * chances[node]
            if path >= self.least:
                paths[node] = path
                staying.append(node)
        return staying

    def _learn(self, x: Tensor, *, kept: bool) -> None:
        """A step of online Newton for the logistic loss."""
        chance = torch.sigmoid(x @ self._weights)
        self._moments += torch.outer(x, x) * max(float(chance * (1 - chance)), 0.02)
        self._weights = self._weights + torch.linalg.solve(self._moments, x * (float(kept) - chance))
        self._labels[kept] += 1
