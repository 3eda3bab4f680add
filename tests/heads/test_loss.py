"""The loss of heads: cross-entropy against a part of a distribution, and over which rows of the LM head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import tiny
from support.heads import shaken

from longspec.heads import KINDS
from longspec.heads.accuracy import accuracies, judged, worth
from longspec.heads.format import new_head
from longspec.heads.head import Judged
from longspec.heads.seen import batch_of, see
from longspec.training.loss import CrossEntropy, Drafted, loss_of


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("kept", [40, 7])
def test_the_cross_entropy_and_its_gradient_are_those_of_torch(cap: float | None, kept: int) -> None:
    """With the whole distribution, and with its likeliest tokens and the sum of all others."""
    generator = torch.Generator().manual_seed(2)
    normed, rows = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((300, 8), (40, 8)))
    target = torch.softmax(torch.randn(300, 40, generator=generator, dtype=torch.float64), -1)
    best = target.topk(kept, -1)
    losses, slopes = [], []
    for ours in (True, False):
        x = normed.clone().requires_grad_()
        if ours:
            loss = CrossEntropy.apply(x, rows, best.indices, best.values, 1 - best.values.sum(-1), cap)  # type: ignore[no-untyped-call]
        else:
            logits = x @ rows.T
            logits = logits if cap is None else torch.tanh(logits / cap) * cap
            falling = torch.log_softmax(logits, -1)
            others = falling.scatter(1, best.indices, -torch.inf)
            loss = -(best.values * falling.gather(1, best.indices)).sum()
            if kept < 40:
                loss = loss - ((1 - best.values.sum(-1)) * torch.logsumexp(others, -1)).sum()
        (3 * loss).backward()
        losses.append(loss.detach())
        slopes.append(x.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(slopes[0], slopes[1])


def test_what_has_no_row_is_left_out_of_the_distribution() -> None:
    """As if the others had its share."""
    generator = torch.Generator().manual_seed(3)
    normed, rows = torch.randn(5, 8, generator=generator), torch.randn(12, 8, generator=generator)
    places = torch.tensor([[3, -1, 7]] * 5)
    probs, rest = torch.tensor([[0.4, 0.3, 0.1]] * 5), torch.full((5,), 0.2)
    lost = CrossEntropy.apply(normed, rows, places, probs, rest, None)  # type: ignore[no-untyped-call]
    same = CrossEntropy.apply(normed, rows, places[:, ::2], probs[:, ::2] / 0.7, rest / 0.7, None)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(lost, same)


def test_a_batch_is_trained_over_the_draft_vocabulary_and_its_own_tokens(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    head = new_head("clover", model, tokens=torch.arange(10, 42))
    drafted = Drafted(model, head)
    rows, places = drafted.of(torch.tensor([[11, 50, 50, 2]]))
    assert (places >= 0).nonzero()[:, 0].tolist() == [2, *range(10, 42), 50]
    for token in (2, 10, 41, 50):
        assert torch.equal(rows[places[token]], model.decoder.head[token])
    assert drafted.of(torch.tensor([[11, 12]]))[0].shape[0] == 32


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"exits"}))
def test_a_step_draws_the_positions_that_drafts_are_deep_behind(tmp_path: Path, kind: str) -> None:
    """Each depth of a share of the answer's, among those of the depth before, which count for all of them."""
    model = tiny(tmp_path, num_hidden_layers=4)
    head = shaken(kind, model, depth=4)
    layers = head.reads(model)
    seen = see(model, [3 + (i * i) % 50 for i in range(100)], 20, layers)
    whole, _ = batch_of(model, [seen], layers)
    batch, _ = batch_of(model, [seen], layers, 7)
    assert [weight for _, weight in map(batch.chains, range(4), [99] * 4)] == pytest.approx([1, 1, 1, 1], rel=0.03)
    with torch.no_grad():
        outs, all_outs = [*head.module.outputs(batch)], [*head.module.outputs(whole)]
    before: set[int] = {*range(100)}
    for depth, (out, every) in enumerate(zip(outs, all_outs, strict=True)):
        assert out.places is not None
        own = out.places[out.places >= 18].tolist()  # parallelspec's first depth is the text's rows
        assert abs(len(own) - 80 * 0.7**depth) <= depth + 1
        assert {*own} <= before
        before = {*own}
        at = [every.places.tolist().index(place) for place in out.places.tolist()]  # type: ignore[union-attr]
        torch.testing.assert_close(out.hidden, every.hidden[:, at], atol=1e-4, rtol=1e-4)
    again, _ = batch_of(model, [seen], layers, 7)
    other, _ = batch_of(model, [seen], layers, 8)
    assert torch.equal(again.chains(2, 99)[0], batch.chains(2, 99)[0])
    assert not torch.equal(other.chains(2, 99)[0], batch.chains(2, 99)[0])


def test_the_loss_of_drawn_positions_is_that_of_all_on_average(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    head = shaken("medusa", model, depth=3)
    seen, layers, drafted = see(model, [3 + (i * i) % 50 for i in range(60)], 1, (2,)), (2,), Drafted(model, head)
    parameters = [*head.module.parameters()]

    def of(step: int | None) -> torch.Tensor:
        loss = loss_of(model, head, drafted, *batch_of(model, [seen], layers, step))
        slopes = torch.autograd.grad(loss, parameters)
        return torch.cat([loss.detach().flatten(), *(slope.flatten() for slope in slopes)])

    wanted, drawn = of(None), torch.stack([of(step) for step in range(300)])
    torch.testing.assert_close(drawn[7], of(7), rtol=0, atol=0)
    assert drawn[:, 0].std() > 0
    assert abs(float(drawn[:, 0].mean() - wanted[0])) < 4 * float(drawn[:, 0].std()) / 300**0.5
    assert float(torch.cosine_similarity(drawn.mean(0)[1:], wanted[1:], 0)) > 0.99


def test_a_path_is_kept_with_one_second_likeliest_token(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    module = new_head("medusa", model, depth=3).module
    ranks = torch.tensor([[0, 0, 2, 1, 0, 0], [0, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1, 9]])
    counted = torch.tensor([[True] * 6, [True] * 5 + [False], [True] * 5 + [False]])
    told = [Judged(torch.ones(3, 6), ranks, counted, (1, 2, 3))]
    assert module.kept(told[0]).tolist() == [3, 3, 0, 2, 2]
    assert worth(module, told) == 3.0
    assert accuracies(told) == [0.6667, 0.8, 0.4]
    assert accuracies(told, among=2) == [0.8333, 1.0, 1.0]
    assert worth(module, []) == 1.0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_all_outputs_are_judged_at_all_positions_of_an_answer(tmp_path: Path, kind: str) -> None:
    model = tiny(tmp_path, num_hidden_layers=4)
    head = new_head(kind, model, depth=3)
    (told,) = judged(model, head, [see(model, [3 + (i * i) % 50 for i in range(30)], 6, head.reads(model))])
    length = 30 - 5  # from the position before the answer on
    if kind == "exits":
        assert told.counted.sum(1).tolist() == [length] * len(told.behind)
        return
    assert told.behind == (1, 2, 3)
    assert told.counted.sum(1).tolist() == [length] * 3
    assert told.counted.all(0).sum() == length - 2
