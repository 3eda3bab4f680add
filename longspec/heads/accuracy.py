"""How often a head is right, by depth, when it is given the true tokens before (teacher forcing), as in training.

Takes a target, a head in the target's dtype, and texts; gives shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longspec.heads.format import Trained
from longspec.heads.head import Batch
from longspec.heads.seen import batch_of, see
from longspec.model.load import Model

__all__ = ["accuracies"]


@torch.no_grad()
def accuracies(model: Model, head: Trained, texts: Sequence[tuple[Sequence[int], int]], among: int = 1) -> list[float]:
    """By depth, how often the target's likeliest token is among so many of the head's likeliest. texts: the tokens and
    how many of them are the prompt's, of which no place counts.
    """
    rows, layers = head.rows(model), head.reads(model)
    right: dict[int, int] = {}
    seen: dict[int, int] = {}
    for tokens, prompt in texts:
        batch, target = batch_of(model, [see(model, tokens, prompt, layers)], layers)
        states = {layer: state.to(rows.dtype) for layer, state in batch.states.items()}
        for out in head.module.outputs(Batch(states, batch.embedded.to(rows.dtype))):
            places = torch.arange(out.hidden.shape[1]) if out.places is None else out.places
            at = places.to(rows.device) + out.behind
            own = (at < target.tokens.shape[1]).nonzero()[:, 0]
            own = own[target.counted[0, at[own]]]
            best = (head.module.norm(out.hidden[0, own]) @ rows.T).topk(min(among, len(rows)), -1).indices
            if head.tokens is not None:
                best = head.tokens.to(best.device)[best]
            right[out.behind] = right.get(out.behind, 0) + int((best == target.top[0, at[own], :1]).any(-1).sum())
            seen[out.behind] = seen.get(out.behind, 0) + len(own)
    return [round(right[behind] / max(1, seen[behind]), 4) for behind in sorted(seen)]
