"""The loss of heads: cross-entropy against a part of a distribution, and over which rows of the LM head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import tiny

from longspec.heads.format import new_head
from longspec.training.loss import CrossEntropy, Drafted


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
