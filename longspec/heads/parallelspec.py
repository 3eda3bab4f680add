"""ParallelSpec: a layer that drafts all depths in one pass, over learned mask rows (2410.05589).

    x_t = F [u(H_t); e(x_t+1)]     a row for each position, cached; its output gives the first drafted token
    m_1, ..., m_k-1                masks behind the newest position t, at t + j, which give the tokens behind that one
                                   and read the text up to t and the masks before their own

H_t: the target's hidden states of the layers that it reads, u(H) of a root mean square of 1; e(x): the embedding of
token x. In training many positions have masks (anchors), all in one pass, the groups behind the text: a mask reads its
own group's only. Deep anchors are dropped as P-EAGLE does it (2602.01469; `Batch.chains`).
Different from the papers: three layers are read, F begins as a linear probe of the next state and a mask as the best
constant of its depth; the layer is initialised as the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from longspec.heads.head import Batch, Fit, Out
from longspec.heads.layers import Layer, Norm, turn_of
from longspec.heads.one_pass import OnePass
from longspec.model.config import Config

__all__ = ["ParallelSpec"]


class ParallelSpec(OnePass):
    def __init__(self, config: Config, reads: Sequence[int], depth: int) -> None:
        super().__init__(config, reads, depth)
        width = config.width
        self.fuse = nn.Linear((len(reads) + 1) * width, width, bias=False)
        self.mask = nn.Parameter(torch.randn(depth - 1, width)) if depth > 1 else None
        self.layers = nn.ModuleList([Layer(config)])
        self.norm = Norm(width, config.eps)

    @classmethod
    def reads_of(cls, layers: int) -> tuple[int, ...]:
        return tuple(sorted({max(1, layers // 2), max(1, layers - 3), layers}))

    @property
    def masks(self) -> Tensor | None:
        return self.mask

    def enter(self, features: Tensor, tokens: Tensor) -> Tensor:
        entered: Tensor = self.fuse(self.told(features, tokens))
        return entered

    def drafted(self, hidden: Tensor) -> Tensor:
        return hidden.unsqueeze(1) if self.mask is None else hidden

    def outputs(self, batch: Batch) -> Iterator[Out]:
        x = self.enter(batch.read(self.reads)[:, :-1], batch.embedded[:, 1:])
        length, device = x.shape[1], x.device
        chains = [batch.chains(j, length) for j in range(1, min(self.depth, length))]
        groups = [torch.arange(length, device=device), *(places for places, _ in chains)]
        anchors, sizes = torch.cat(groups), [len(group) for group in groups]
        depths = torch.arange(len(groups), device=device).repeat_interleave(torch.tensor(sizes, device=device))
        if self.mask is not None:
            masks = self.mask[depths[length:] - 1].to(x.dtype)
            x = torch.cat((x, masks.expand(len(x), -1, -1)), 1)
        turn = turn_of(self.config, anchors + depths, x.dtype)
        hidden = self.layers[0](x, turn, reading(anchors, depths, self.config.windows[0]))
        weights = [1.0, *(weight for _, weight in chains)]
        for j, (own, group) in enumerate(zip(hidden.split(sizes, 1), groups, strict=True)):
            yield Out(own, j + 1, weights[j], group)

    def start(self, fit: Fit) -> None:
        self.fuse.weight.copy_(fit(lambda b: self.told(b.read(self.reads)[:, :-1], b.embedded[:, 1:]), 1))
        if self.mask is not None:
            for j, mask in enumerate(self.mask):
                mask.copy_(fit(lambda b: torch.ones_like(b.embedded[..., :1]), j + 2)[:, 0])


def reading(anchors: Tensor, depths: Tensor, window: int | None) -> Tensor:
    """[r, r] bool: which rows a row reads. anchors: [r], their positions; depths: [r], 0 is the text's row there."""
    text = (depths == 0) & (anchors <= anchors[:, None])
    group = (anchors == anchors[:, None]) & (depths <= depths[:, None])
    places = anchors + depths
    near = places[:, None] - places < (window or len(places))
    return (text | group) & near
