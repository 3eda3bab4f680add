"""Early exits with matrices of their own (AdaDecode, 2506.03700): before its last layers the target's state is turned
into what its LM head reads.

    exit i:  logits = E norm(T_i h_i / rms(h_i)),   T_i [W, W], E the LM head's rows of the draft vocabulary

E is the target's own and frozen. Where the paper trains T from the identity, this begins with the least squares of the
final state on h_i: on the default model the likeliest token is then the target's at 34, 57 and 70 % of positions after
20, 24 and 27 of 30 layers, and with the LM head alone at 18, 37 and 50 %. The loss is the seam's, of which the KL
divergence from the target is the paper's whole.

Thresholds of confidence aren't trained: held-out texts tell them (`calibrate`), one for each exit, where the paper
takes 0.85 for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from longspec.errors import UsageError
from longspec.heads.head import Batch, Fit, Head, Judged, Out, unit
from longspec.heads.layers import Norm
from longspec.model.config import Config

__all__ = ["WANTED", "Exits", "threshold_of"]

WANTED = 0.8
"""Of the tokens that an exit drafts, the share that is to be kept."""

_UNTOLD = 0.6  # the threshold of an exit of which no text has told anything


class Exits(Head):
    thresholds: Tensor  # [exits]: the probability of the likeliest token from which on it is drafted

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        if not reads:
            raise UsageError("A model of one layer has no early exits; train another kind of head for it.")
        self.turns = nn.ModuleList(nn.Linear(config.width, config.width, bias=False) for _ in reads)
        self.norm = Norm(config.width, config.eps)
        self.register_buffer("thresholds", torch.full((len(reads),), _UNTOLD))
        for turn in self.turns:
            nn.init.eye_(turn.weight)  # type: ignore[arg-type]

    @classmethod
    def reads_of(cls, layers: int) -> tuple[int, ...]:
        """The exits, after two thirds, four fifths and nine tenths of the layers: earlier ones are seldom right."""
        return tuple(sorted({layers * 2 // 3, layers * 4 // 5, layers * 9 // 10} - {0, layers}))

    def exit(self, number: int, hidden: Tensor) -> Tensor:
        """[..., W], normed: what the LM head reads at an exit, of the states [..., W] after its layer."""
        turned: Tensor = self.norm(self.turns[number](unit(hidden)))
        return turned

    def outputs(self, batch: Batch) -> Iterator[Out]:
        for layer, turn in zip(self.reads, self.turns, strict=True):
            yield Out(turn(unit(batch.states[layer])), 0)

    def start(self, fit: Fit) -> None:
        for layer, turn in zip(self.reads, self.turns, strict=True):
            turn.weight.copy_(fit(lambda batch, layer=layer: unit(batch.states[layer]), 0))  # type: ignore[operator, misc]

    def calibrate(self, told: Sequence[Judged]) -> None:
        probs, right = (
            torch.cat([each[:, text.counted.all(0)] for text, each in zip(told, values, strict=True)], 1)
            for values in ([text.probs for text in told], [text.right for text in told])
        )
        self.thresholds.copy_(torch.tensor([threshold_of(*each) for each in zip(probs, right, strict=True)]))

    def kept(self, told: Judged) -> Tensor:
        """Of the chains that each exit drafts alone, in the mean: how sure one must be is told by `calibrate`."""
        right = told.right[:, told.counted.all(0)]
        places = torch.arange(right.shape[1], device=right.device)
        stops = torch.where(right, len(places), places).flip(1).cummin(1).values.flip(1)  # the next one that isn't kept
        return (stops - places).clamp_max(self.depth).double().mean(0)

    def cost(self) -> tuple[int, int]:
        """At most: of a chain whose every token is drafted at the last exit."""
        weights, _ = super().cost()
        return weights * self.depth, len(self.reads) * self.depth


def threshold_of(probs: Tensor, right: Tensor) -> float:
    """The lowest probability of those [n] from which on a share `WANTED` is right [n]; 1 if there is none."""
    order = probs.argsort(descending=True)
    share = right[order].double().cumsum(0) / torch.arange(1, len(order) + 1, device=order.device)
    enough = (share >= WANTED).nonzero()
    return float(probs[order[enough[-1, 0]]]) if len(enough) else 1.0
