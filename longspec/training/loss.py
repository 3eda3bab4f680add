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
from longspec.heads.seen import Target
from longspec.model.load import Model

__all__ = ["CrossEntropy", "Drafted", "loss_of"]

_PIECE = 128  # rows of logits that are computed at once: they fit a core's cache


class Drafted:
    """The rows of the target's LM head that a batch is trained over, and where each token's lies."""

    def __init__(self, model: Model, head: Trained) -> None:
        self._all, vocabulary = model.decoder.head, model.decoder.config.vocabulary
        self._rows, self._places = head.rows(model), torch.full((vocabulary,), -1, device=self._all.device)
        own = torch.arange(vocabulary) if head.tokens is None else head.tokens
        self._places[own.to(self._all.device)] = torch.arange(len(own), device=self._all.device)

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
    with torch.autocast(model.decoder.device.type, torch.bfloat16, enabled=model.dtype == "bf16"):
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
            logits = (normed[piece].to(rows.dtype) @ rows.T).to(normed.dtype)
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            lost, slope = _apart(logits, places[piece], probs[piece].to(normed.dtype), rest[piece].to(normed.dtype))
            if cap is not None:
                slope *= 1 - (logits / cap).square()
            loss += lost
            gradient[piece] = slope.to(rows.dtype) @ rows
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None, None, None


def _apart(logits: Tensor, places: Tensor, probs: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of some rows, and its slope by the logits [t, D], which takes their place in memory.

    With mass 1, likeliest tokens K and others O: L = log Z - sum_K p z - r log(sum_O exp z). Its slope is q - p in K,
    and q - r exp(z) / sum_O exp z in O.
    """
    has = places >= 0
    at, probs = places.clamp_min(0), probs * has
    top = logits.amax(-1, keepdim=True)
    own = torch.where(has, logits.gather(1, at) - top, 0.0)
    powers = (logits - top).exp_()
    whole = powers.sum(-1, keepdim=True)
    others = _without(powers, at, has)
    left = others.sum(-1, keepdim=True)
    rest = torch.where(left > 0, rest[:, None], 0.0)
    mass = (probs.sum(-1, keepdim=True) + rest).clamp_min(1e-12)
    probs, rest = probs / mass, rest / mass
    safe = left.clamp_min(torch.finfo(left.dtype).tiny)
    loss = (whole.log() - (probs * own).sum(-1, keepdim=True) - rest * safe.log()).sum()
    slope = powers.div_(whole).sub_(others.mul_(rest / safe)).scatter_add_(1, at, -probs)
    return loss, slope


def _without(powers: Tensor, at: Tensor, has: Tensor) -> Tensor:
    """A copy of powers [t, D] that is 0 at these places [t, k], but where they aren't one (`has`)."""
    beside = torch.cat((powers, powers.new_zeros(len(powers), 1)), -1)  # a last column for those
    return beside.scatter_(1, torch.where(has, at, powers.shape[1]), 0.0)[:, :-1].contiguous()
