"""The token positions that sessions bring to a forward pass, and the results of one flat pass over all of them.

Some of a draft's nodes may leave on the way (`pruning`): what comes after is as if they had never been drafted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from time import perf_counter

import torch
from torch import Tensor

from longspec.engine.input import Input
from longspec.engine.pruning import Pruner
from longspec.model.decoder import Decoder, Rows
from longspec.sampling.sampler import choose, likeliest, sound
from longspec.sampling.verify import verify
from longspec.semantic.probe import Judge
from longspec.types import Needs, TokenLogprob, Verdict

__all__ = ["Input", "Output", "forward", "logits_of", "logprobs_of"]


@dataclass(frozen=True, slots=True)
class Output:
    """The results of a pass, whose choosing inputs come first."""

    inputs: Sequence[Input]  # as they ended
    rows: Rows
    features: Mapping[int, Tensor]  # by layer count: hidden states [r, width]
    verdicts: Sequence[Verdict]  # one per choosing input
    seconds: float

    def features_of(self, index: int, committed: Sequence[int]) -> dict[int, Tensor]:
        """Hidden states of the committed positions of an input, by layer count."""
        at = self.rows.spans[index].at
        return {layer: hidden[at][committed] for layer, hidden in self.features.items()}


def forward(
    choosing: Sequence[Input],
    others: Sequence[Input],
    decoder: Decoder,
    needs: Needs,
    pruner: Pruner | None = None,
    judge: Judge | None = None,
) -> Output:
    """Run all inputs in one pass through all layers; the target verifies the drafts of the choosing ones. pruner: has
    nodes of drafts leave on the way. judge: what may keep a draft that the target would have written otherwise.
    """
    began = perf_counter()
    inputs: Sequence[Input] = [*choosing, *others]
    rows = Rows.of([one.chunk() for one in inputs], decoder.device)
    if pruner is not None and any(one.may_shrink for one in choosing) and not any(one.begun for one in inputs):
        inputs, rows, hidden, features = _pruned(inputs, rows, decoder, needs.layers, pruner)
        choosing = inputs[: len(choosing)]
    else:
        hidden, features = _layers(inputs, rows, decoder, needs.layers)
        pruner = None
    verdicts: list[Verdict] = []
    if choosing:
        last = _last(choosing, rows, hidden)
        states = None if judge is None else decoder.normed(last)
        verdicts = _verdicts(choosing, decoder.logits(last), needs, judge, states)
    if pruner is not None:
        pruner.observe(choosing, verdicts)
    return Output(inputs, rows, features, verdicts, perf_counter() - began)


def logits_of(inputs: Sequence[Input], decoder: Decoder) -> Tensor:
    """Logits [r, V] of every choosing position of these inputs, in one pass."""
    rows = Rows.of([one.chunk() for one in inputs], decoder.device)
    return decoder.logits(_last(inputs, rows, _layers(inputs, rows, decoder, ())[0]))


def _layers(
    inputs: Sequence[Input], rows: Rows, decoder: Decoder, needed: Sequence[int]
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Hidden states [r, width] after all layers, and after the layers needed.

    Positions that a drafter has run through the first layers join at the layer that they have reached. The earlier
    positions of an input are never behind its later ones, so those that lack a layer are the last of their inputs.
    (Earlier layers of begun positions aren't computed again: drafters get their last state for them.)
    """
    last_layer, hidden = decoder.config.layers, None
    features = {0: decoder.embed(rows.tokens)} if 0 in needed else {}
    if all(one.begun is None for one in inputs):
        for first, last in pairwise(sorted({0, *needed, last_layer})):
            hidden = decoder.forward(rows, hidden, first, last)
            if last in needed:
                features[last] = hidden
        assert hidden is not None
        return hidden, features
    layers = [layer for one in inputs for layer in one.layers]
    hidden = torch.empty(len(layers), decoder.config.width, dtype=decoder.dtype, device=decoder.device)
    for one, span in zip(inputs, rows.spans, strict=True):
        if one.begun is not None:
            hidden[span.at][: len(one.begun.layers)] = one.begun.hidden
    for first, last in pairwise(sorted({0, *layers, *needed, last_layer})):
        chunks = [one.chunk(sum(layer > first for layer in one.layers)) for one in inputs]
        part = Rows.of([chunk for chunk in chunks if chunk.tokens], decoder.device)
        lacking = torch.tensor([layer <= first for layer in layers], device=decoder.device)
        if part.spans:
            hidden[lacking] = decoder.forward(part, hidden[lacking] if first else None, first, last)
        if last in needed:
            features[last] = hidden.clone()
    return hidden, features


def _pruned(
    inputs: Sequence[Input], rows: Rows, decoder: Decoder, needed: Sequence[int], pruner: Pruner
) -> tuple[Sequence[Input], Rows, Tensor, Mapping[int, Tensor]]:
    """Inputs, rows and hidden states after all layers and after those needed; some nodes of drafts leave on the way."""
    features = {0: decoder.embed(rows.tokens)} if 0 in needed else {}
    hidden = None
    for first, last in pairwise(sorted({0, *needed, pruner.layer, decoder.config.layers})):
        hidden = decoder.forward(rows, hidden, first, last)
        if last in needed:
            features[last] = hidden
        if last == pruner.layer:
            inputs, staying = pruner.prune(inputs, hidden)
            if staying is not None:
                rows = Rows.of([one.chunk() for one in inputs], decoder.device)
                hidden, features = hidden[staying], {layer: each[staying] for layer, each in features.items()}
    assert hidden is not None
    return inputs, rows, hidden, features


def _last(inputs: Sequence[Input], rows: Rows, hidden: Tensor) -> Tensor:
    """Hidden states of the choosing positions, input by input; positions behind them are ignored."""
    spans = rows.spans[: len(inputs)]
    if all(len(one.lacking) == 1 for one in inputs):
        return hidden[: spans[-1].at.stop]
    return torch.cat([hidden[span.at][-one.choosing :] for span, one in zip(spans, inputs, strict=True)])


def _verdicts(
    inputs: Sequence[Input], logits: Tensor, needs: Needs, judge: Judge | None = None, states: Tensor | None = None
) -> list[Verdict]:
    """The target's verdicts on the drafts, with the successors and entropies needed, in few copies to the host."""
    successors = iter(likeliest(logits, needs.successors).tolist() if needs.successors else ())
    entropies = iter(_entropies(logits) if needs.entropy else ())
    verdicts, start = [], 0
    for one, choices in zip(inputs, _choices(inputs, logits), strict=True):
        verdict = verify(one.draft, one.parents, choices)
        if judge is not None and states is not None:
            verdict = _judged(one, verdict, judge, states[start : start + one.choosing])
        after: list[tuple[int, list[int]]] = []
        entropy = None
        if needs.successors:
            after = [(token, next(successors)) for token in (one.lacking[-1], *one.draft)]
        if needs.entropy:
            entropy = [next(entropies) for _ in range(one.choosing)][verdict.kept[-1] + 1 if verdict.kept else 0]
        chosen = tuple(max(choice, 0) for choice in verdict.choices)  # a drafter may continue any of them
        logprobs: tuple[TokenLogprob, ...] = ()
        if (top := one.session.logprobs) is not None and verdict.bonus >= 0:
            rows = logits[[start, *(start + 1 + node for node in verdict.kept)]]
            logprobs = logprobs_of(rows, [*(one.draft[node] for node in verdict.kept), max(verdict.bonus, 0)], top)
        start += one.choosing
        verdicts.append(Verdict(verdict.kept, verdict.bonus, chosen, after, entropy, logprobs, verdict.meant))
    return verdicts


def _judged(one: Input, verdict: Verdict, judge: Judge, states: Tensor) -> Verdict:
    """The verdict, or where the judge says so one that keeps the whole draft, if that is a chain. states:
    [1 + n, width], normed, of the last token and of the draft's.
    """
    size, exact = len(one.draft), len(verdict.kept)
    is_chain = one.parents == list(range(-1, size - 1))
    if not is_chain or verdict.bonus < 0 or not judge(one.session, one.draft, exact, states) or exact == size:
        return verdict
    return replace(verdict, kept=tuple(range(size)), bonus=verdict.choices[size], meant=size - exact)


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """Of each token in its row of the model's own logits [r, V], before any sampling option; with the `top` best."""
    falling = torch.log_softmax(logits.float(), -1)
    own = falling.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = falling.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    listed = (tuple(zip(some, values, strict=True)) for some, values in pairs)
    return tuple(map(TokenLogprob, tokens, own, listed))


def _choices(inputs: Sequence[Input], logits: Tensor) -> list[list[int]]:
    """The target's token after every choosing position, input by input, in one copy to the host; -1 where the model
    gave no numbers to choose from, and less where a processor did.
    """
    good, wrong = sound(logits), dict[int, int]()
    chosen, start = [], 0
    for _, alike in groupby(inputs, _sampled_alike):
        group = list(alike)
        session, end = group[0].session, start + sum(one.choosing for one in group)
        rows, sampling = logits[start:end], session.sampling
        if session.processes:
            rows, faults = session.processed(rows, group[0].paths())
            session.faults = [*faults.values()]
            wrong |= {start + row: -2 - i for i, row in enumerate(faults)}
        if session.constraint is not None:
            rows = session.constraint.mask(rows, group[0].paths())
        keys = [] if sampling.is_greedy else [key for one in group for key in one.session.noise_keys(one.depths)]
        contexts = [session.seen.union(path) for path in group[0].paths()] if sampling.penalises else None
        chosen.append(choose(rows, sampling, keys, contexts))
        start = end
    both = enumerate(zip(torch.cat(chosen).tolist(), good.tolist(), strict=True))
    flat = [wrong.get(row, token) if is_good else -1 for row, (token, is_good) in both]
    ends = list(accumulate(one.choosing for one in inputs))
    return [flat[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _sampled_alike(one: Input) -> tuple[object, ...]:
    """A grouping key: adjacent inputs with equal sampling parameters are sampled in one call; an input with a grammar,
    a penalty or a processor alone.
    """
    session, sampling = one.session, one.session.sampling
    alone = id(one) if session.constraint is not None or sampling.penalises or session.processes else None
    return *sampling.without_seed, alone


def _entropies(logits: Tensor) -> list[float]:
    """The entropy of each position's distribution, in nats."""
    rows = (torch.log_softmax(row.float(), -1) for row in logits)  # copies of one row at a time
    return [-float((falling.exp() * falling).sum()) for falling in rows]
