"""The loss of any head, in one place.

    sum over the outputs of  weight * (cross-entropy against the target's distribution + smooth L1 to its last state)

Takes a head's outputs for a batch and the target's; knows no kind of head. The head is trained over the tokens that it
drafts: its draft vocabulary, and the texts' own tokens, which a session has at hand too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.heads.format import Trained
from longspec.heads.head import Batch
from longspec.heads.seen import Target, halves
from longspec.model.load import Model

__all__ = ["CrossEntropy", "Drafted", "loss_of"]

_PIECE = 128  # rows of logits that are computed at once: they fit a core's cache


class Drafted:
    """The rows of the target's LM head that a batch is trained over, and where each token's lies."""

    def __init__(self, model: Model, head: Trained) -> None:
        rows, vocabulary = model.decoder.head, model.decoder.config.vocabulary
        self._all = rows if halves(model) else rows.float()
        self._rows = self._all if head.tokens is None else self._all[head.tokens.to(rows.device)]
        self._places = torch.full((vocabulary,), -1, device=rows.device)
        own = torch.arange(vocabulary) if head.tokens is None else head.tokens
        self._places[own.to(rows.device)] = torch.arange(len(own), device=rows.device)

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [D, W] and places [V], -1 for what isn't drafted. tokens: of a batch's texts."""
        found = torch.unique(tokens)
        more = found[self._places[found] < 0]
        if not len(more):
            return self._rows, self._places
        places = self._places.clone()
        places[more] = torch.arange(len(self._rows), len(self._rows) + len(more), device=places.device)
        return torch.cat((self._rows, self._all[more])), places


def loss_of(model: Model, head: Trained, drafted: Drafted, batch: Batch, target: Target) -> Tensor:
    """Summed over the answers' positions and the head's outputs."""
    rows, places = drafted.of(target.tokens)
    cap, length = model.decoder.config.logit_softcap, target.tokens.shape[1]
    # makes the smooth L1 independent of the target's scale
    scale = target.final[target.counted].square().mean().sqrt().clamp_min(1e-6)
    loss = target.final.new_zeros(())
    # Without its cache, which all threads share and each of them empties: bits would depend on who came when.
    with torch.autocast(model.decoder.device.type, torch.bfloat16, enabled=halves(model), cache_enabled=False):
        for out in head.module.outputs(batch):
            places_of = torch.arange(out.hidden.shape[1], device=rows.device) if out.places is None else out.places
            at = places_of + out.behind  # the rows of the target that they stand for
            fit = at < length
            at, hidden = at[fit], out.hidden[:, fit]
            counted = target.counted[:, at]
            normed = head.module.norm(hidden[counted].float())
            wanted = [each[:, at][counted] for each in (target.top, target.probs, target.rest, target.final)]
            entropy = CrossEntropy.apply(normed, rows, places[wanted[0]], *wanted[1:3], cap)  # type: ignore[no-untyped-call]
            apart = F.smooth_l1_loss(normed / scale, wanted[3] / scale, reduction="none").mean(-1).sum()
            loss = loss + out.weight * (entropy + apart)
    return loss


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy of a distribution against the logits of normed [t, W], summed over t.

    The distribution is of the likeliest tokens, places [t, k] among the rows, -1 for those without one, with probs
    [t, k]; and of all others together, rest [t]. What has no row is left out, and the others have its share. The
    gradient is computed in the forward pass, in pieces: no [t, D] logits are kept. The LM head `rows` is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, normed: Tensor, rows: Tensor, places: Tensor, probs: Tensor, rest: Tensor, cap: float | None
    ) -> Tensor:
        loss, gradient = normed.new_zeros(()), torch.empty_like(normed)
        for start in range(0, len(normed), _PIECE):
            piece = slice(start, start + _PIECE)
            logits = normed.new_full((len(normed[piece]), len(rows) + 1), -torch.inf)  # the last column: no row
            logits[:, :-1] = normed[piece].to(rows.dtype) @ rows.T
            steep = None
            if cap is not None:
                logits[:, :-1].div_(cap).tanh_()
                steep = 1 - logits[:, :-1].square()
                logits[:, :-1].mul_(cap)
            lost, slope = _apart(logits, places[piece], probs[piece].to(normed.dtype), rest[piece].to(normed.dtype))
            slope = slope[:, :-1] if steep is None else slope[:, :-1] * steep
            loss += lost
            gradient[piece] = slope.to(rows.dtype) @ rows
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None, None, None


def _apart(logits: Tensor, places: Tensor, probs: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of some rows, and its slope by the logits [t, D + 1], which takes their place in memory. The last column
    is -inf.

    With mass 1, likeliest tokens K and others O: L = log Z - sum_K p z - r log(sum_O exp z). Its slope is q - p in K,
    and q - r exp(z) / sum_O exp z in O.
    """
    has = places >= 0
    at, probs = torch.where(has, places, logits.shape[1] - 1), probs * has
    own = logits.sub_(logits.amax(-1, keepdim=True)).gather(1, at).masked_fill_(~has, 0.0)
    powers = logits.exp_()
    likely = powers.gather(1, at)
    left = powers.scatter_(1, at, 0.0).sum(-1, keepdim=True)  # the others
    whole = left + likely.sum(-1, keepdim=True)
    rest = torch.where(left > 0, rest[:, None], 0.0)
    mass = (probs.sum(-1, keepdim=True) + rest).clamp_min(1e-12)
    probs, rest = probs / mass, rest / mass
    safe = left.clamp_min(torch.finfo(left.dtype).tiny)
    loss = (whole.log() - (probs * own).sum(-1, keepdim=True) - rest * safe.log()).sum()
    return loss, powers.mul_(1 / whole - rest / safe).scatter_(1, at, likely / whole - probs)
