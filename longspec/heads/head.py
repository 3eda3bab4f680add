"""What a draft head is to training and to drafting: the seam that a kind of head is written against.

A head takes a batch of texts (the target's hidden states and embeddings) and gives hidden states for the target's LM
head, each with the places that it speaks for. Loss, features, data and files know no more of a head than this. It
doesn't know them, nor sessions and drafts.

Letters: B texts, n tokens of the longest one, R rows of an output, W the target's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspec.heads.layers import Norm
from longspec.model.config import Config

__all__ = ["DECAY", "Batch", "Fit", "Head", "Judged", "Out", "unit"]

DECAY = 0.7
"""Weight of a depth's loss relative to the depth before: a deeper token counts only if all before it are kept."""

LEAST = 0.2
"""Of the positions behind which a training step drafts, the share of the deepest depth's, at least."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts side by side, padded at their ends to n tokens."""

    states: Mapping[int, Tensor]  # by number of target layers: hidden states [B, n, W] after so many
    embedded: Tensor  # [B, n, W], the target's embeddings of the tokens themselves
    drawn: Tensor | None = None  # [c] int64: positions before a token that counts, in random order; None: not drawn
    beside: Callable[[Tensor, Mapping[int, Sequence[Tensor]], Tensor], Tensor] | None = None
    """`longspec.model.beside.beside` of the target: rows without a token, through its frozen layers."""

    def read(self, layers: Sequence[int]) -> Tensor:
        """[B, n, layers * W]: these layers' hidden states, joined."""
        return torch.cat([self.states[layer] for layer in layers], -1)

    def chains(self, depth: int, length: int) -> tuple[Tensor, float]:
        """The positions [c] of the first `length`, rising, behind which a draft is this deep, counted from 0; and the
        weight of each in the loss. They are among those of the depth before.

        A training step drafts behind a share of its positions that falls as the depths' weights do, and each counts for
        the others too (P-EAGLE, 2602.01469). So a depth costs what it weighs, and the loss is the same on average.
        """
        if self.drawn is None:
            return torch.arange(length - depth, device=self.embedded.device), DECAY**depth
        count = max(1, round(len(self.drawn) * max(DECAY**depth, LEAST)))
        places = self.drawn[:count].sort().values
        return places[places < length - depth], DECAY**depth * len(self.drawn) / count


@dataclass(frozen=True, slots=True)
class Out:
    """Hidden states that a head gives for one number of positions ahead."""

    hidden: Tensor  # [B, R, W], before the head's `norm`
    behind: int  # stands for the target's last state so many positions on: 0 an early exit, 1 the first drafted token
    weight: float = 1.0
    places: Tensor | None = None  # [R] int64: the position of each row; None is 0 to R - 1


@dataclass(frozen=True, slots=True)
class Judged:
    """How a head's k outputs do on a text of n tokens, the true tokens before each given; column t is of position t."""

    probs: Tensor  # [k, n] fp32: how sure it is of its likeliest token
    ranks: Tensor  # [k, n] int64: how many tokens it finds likelier than the target's likeliest one
    counted: Tensor  # [k, n] bool: there is such an output, and what it foretells is the answer's
    behind: tuple[int, ...]  # [k], as in `Out`

    @property
    def right(self) -> Tensor:
        """[k, n] bool."""
        return (self.ranks == 0) & self.counted


class Fit(Protocol):
    """Ridge regression over a training's texts."""

    def __call__(self, inputs: Callable[[Batch], Tensor], behind: int, layer: int | None = None) -> Tensor:
        """The matrix [W, I] that best makes the target's last states, or those after `layer`, `behind` positions on and
        of root mean square 1, of `inputs` [B, R, I], whose row t is of position t.
        """
        ...


class Head(nn.Module):
    """A draft head. A subclass says `outputs`, and of the rest what differs."""

    LAYERS: ClassVar[int] = 0
    """Number of layers over the sequence's positions, which have keys and values."""

    SECONDS: ClassVar[int] = 1
    """Of a path in the tree that validates it: 20 nodes at a depth of 5. 0 is a chain."""

    norm: Norm  # of the output, in place of the target's final norm

    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        """config: of its layers (`block_of`). reads: the numbers of target layers after which states are read, as
        `reads_of` gives them. depth: limit of a draft, in tokens.
        """
        super().__init__()
        self.config, self.reads, self.depth = config, tuple(reads), depth

    @classmethod
    def reads_of(cls, layers: int) -> tuple[int, ...]:
        """The layers that it reads of a target of so many: rising, 0 is the embedding."""
        return (layers,)

    def outputs(self, batch: Batch) -> Iterator[Out]:
        """What it would draft at every position, the true tokens before it given (teacher forcing)."""
        raise NotImplementedError

    def cost(self) -> tuple[int, int]:
        """Weights that a chain of `depth` tokens reads, and how often it reads the LM head's rows."""
        return sum(parameter.numel() for parameter in self.parameters()), 1

    @classmethod
    def block(cls, config: Config) -> Config:
        """The config of its layers, from that of plain ones with the target's widths."""
        return config

    def take(self, final: Tensor) -> None:
        """Begin with the weights [W] of the target's final norm."""
        self.norm.weight.copy_(final)

    def start(self, fit: Fit) -> None:
        """Set the weights that least squares can find, so that training begins with a linear probe's guesses."""

    def calibrate(self, told: Sequence[Judged]) -> None:
        """Set what isn't trained, but told by held-out texts: how its outputs do on each."""

    def kept(self, told: Judged) -> Tensor:
        """[m]: how many tokens of a greedy draft are kept, behind each position whose outputs are of the answer. It has
        the likeliest tokens, and all paths with `SECONDS` second-likeliest among these.
        """
        return (told.ranks.clamp_max(2).cumsum(0) <= self.SECONDS).sum(0)[told.counted.all(0)]


def unit(x: Tensor) -> Tensor:
    """X / its root mean square, over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)
