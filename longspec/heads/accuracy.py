"""How often a head is right, and how sure it is, when it is given the true tokens before (teacher forcing), as in
training.

Takes a target, a head in the target's dtype, and texts; gives shares by depth, or each output's judgements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longspec.heads.format import Trained
from longspec.heads.head import Judged
from longspec.heads.seen import batch_of, see
from longspec.model.load import Model

__all__ = ["accuracies", "judged"]


@torch.no_grad()
def accuracies(model: Model, head: Trained, texts: Sequence[tuple[Sequence[int], int]], among: int = 1) -> list[float]:
    """By depth, how often the target's likeliest token is among so many of the head's likeliest; by exit, of early
    ones. texts: the tokens and how many of them are the prompt's, of which no place counts.
    """
    right: dict[tuple[int, int], int] = {}
    seen: dict[tuple[int, int], int] = {}
    for number, behind, logits, best, wanted in _outputs(model, head, texts, among):
        place = (behind, 0 if behind else number)
        right[place] = right.get(place, 0) + int((best == wanted).any(-1).sum())
        seen[place] = seen.get(place, 0) + len(logits)
    return [round(right[place] / max(1, seen[place]), 4) for place in sorted(seen)]


@torch.no_grad()
def judged(model: Model, head: Trained, texts: Sequence[tuple[Sequence[int], int]]) -> list[Judged]:
    """How each output of the head does on texts, as above: how sure it is at each position, and whether it is right."""
    probs: dict[int, list[Tensor]] = {}
    right: dict[int, list[Tensor]] = {}
    for number, _, logits, best, wanted in _outputs(model, head, texts, 1):
        probs.setdefault(number, []).append(torch.softmax(logits.float(), -1).amax(-1))
        right.setdefault(number, []).append((best == wanted)[:, 0])
    return [(torch.cat(probs[number]), torch.cat(right[number])) for number in sorted(probs)]


def _outputs(
    model: Model, head: Trained, texts: Sequence[tuple[Sequence[int], int]], among: int
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """Of each text and output: the output's number, how far behind its positions it speaks, its logits [t, D], its
    likeliest tokens [t, among], and the target's likeliest [t, 1].
    """
    rows, layers, cap = head.rows(model), head.reads(model), model.decoder.config.logit_softcap
    for tokens, prompt in texts:
        batch, target = batch_of(model, [see(model, tokens, prompt, layers)], layers)
        states = {layer: state.to(rows.dtype) for layer, state in batch.states.items()}
        batch = replace(batch, states=states, embedded=batch.embedded.to(rows.dtype))
        for number, out in enumerate(head.module.outputs(batch)):
            places = torch.arange(out.hidden.shape[1]) if out.places is None else out.places
            at = places.to(rows.device) + out.behind
            own = (at < target.tokens.shape[1]).nonzero()[:, 0]
            own = own[target.counted[0, at[own]]]
            logits = head.module.norm(out.hidden[0, own]) @ rows.T
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            best = logits.topk(min(among, len(rows)), -1).indices
            if head.tokens is not None:
                best = head.tokens.to(best.device)[best]
            yield number, out.behind, logits, best, target.top[0, at[own], :1]
