"""How often a head is right, and how sure it is, when it is given the true tokens before (teacher forcing), as in
training.

Takes a target, a head, and texts as the target sees them; gives a `Judged` for each, and what is counted in these. No
pass of the target is needed. Of the target's greedy answers this is what decoding keeps of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from longspec.heads.format import Trained
from longspec.heads.head import Head, Judged
from longspec.heads.seen import Seen, batch_of, halves
from longspec.model.load import Model

__all__ = ["accuracies", "judged", "worth"]


def accuracies(texts: Sequence[Judged], among: int = 1) -> list[float]:
    """By depth, how often the target's likeliest token is among so many of the head's likeliest; by exit, of early
    ones.
    """
    right: dict[tuple[int, int], int] = {}
    seen: dict[tuple[int, int], int] = {}
    for text in texts:
        for number, behind in enumerate(text.behind):
            place, counted = (behind, 0 if behind else number), text.counted[number]
            right[place] = right.get(place, 0) + int((text.ranks[number][counted] < among).sum())
            seen[place] = seen.get(place, 0) + int(counted.sum())
    return [round(right[place] / max(1, seen[place]), 4) for place in sorted(seen)]


def worth(head: Head, texts: Sequence[Judged]) -> float:
    """Tokens per step behind any token of the answers: what is kept, and the bonus."""
    kept = [head.kept(text).double() for text in texts]
    return 1 + float(torch.cat(kept).mean()) if sum(map(len, kept)) else 1.0


@torch.no_grad()
def judged(model: Model, head: Trained, texts: Sequence[Seen]) -> list[Judged]:
    """How the head does on texts, in fp32 or with products in bf16, as it is trained."""
    module, rows, half = deepcopy(head.module).float(), head.rows(model), halves(model)
    rows = rows if half else rows.float()
    places = torch.full((model.decoder.config.vocabulary,), -1, device=rows.device)
    own = torch.arange(len(places)) if head.tokens is None else head.tokens
    places[own.to(rows.device)] = torch.arange(len(rows), device=rows.device)
    with torch.autocast(model.decoder.device.type, torch.bfloat16, enabled=half):
        return [_judged(model, module, head.reads(model), rows, places, text) for text in texts]


def _judged(model: Model, module: Head, layers: Sequence[int], rows: Tensor, places: Tensor, text: Seen) -> Judged:
    """places: [V], of each token among `rows`, -1 where it isn't drafted."""
    batch, target = batch_of(model, [text], layers)
    outs, cap, length = [*module.outputs(batch)], model.decoder.config.logit_softcap, target.tokens.shape[1]
    probs = torch.zeros(len(outs), length, device=rows.device)
    ranks = torch.full((len(outs), length), len(rows), device=rows.device)
    counted = torch.zeros(len(outs), length, dtype=torch.bool, device=rows.device)
    for number, out in enumerate(outs):
        spoken = torch.arange(out.hidden.shape[1]) if out.places is None else out.places
        at = spoken.to(rows.device) + out.behind
        own = (at < length).nonzero()[:, 0]
        own = own[target.counted[0, at[own]]]
        logits = (module.norm(out.hidden[0, own].float()).to(rows.dtype) @ rows.T).float()
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        place, column = places[target.top[0, at[own], :1]], at[own] - out.behind
        mine = logits.gather(1, place.clamp_min(0))
        rank = (logits > mine).sum(-1)
        alike = (rank == 0) & (logits.argmax(-1) != place[:, 0])  # another one is as likely, and is the first
        ranks[number, column] = torch.where(place[:, 0] < 0, len(rows), rank + alike)
        probs[number, column] = torch.softmax(logits, -1).amax(-1)
        counted[number, column] = True
    return Judged(probs, ranks, counted, tuple(out.behind for out in outs))
