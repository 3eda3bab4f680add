"""Attention against fp64, and parts against the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longspec.attention import attend, merge, reference
from longspec.attention.batch_invariant import attend_strictly
from longspec.cache.stage import Bounds, Segment

SHAPES = [(1, 4, 4, 8, 1), (5, 6, 2, 16, 40), (3, 9, 3, 64, 129), (17, 8, 1, 24, 63), (64, 4, 2, 32, 64)]


def exact(
    queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Softmax attention in fp64, head by head."""
    groups = queries.shape[1] // keys.shape[0]
    out = torch.empty(queries.shape, dtype=torch.float64)
    for head in range(queries.shape[1]):
        scores = queries[:, head].double() @ keys[head // groups].double().T * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~allowed, float("-inf"))
        out[:, head] = torch.softmax(scores, -1) @ values[head // groups].double()
    return out


def made(q: int, heads: int, key_heads: int, dim: int, n: int) -> tuple[Tensor, Tensor, Tensor, Bounds]:
    generator = torch.Generator().manual_seed(q * 1000 + n)
    queries = torch.randn(q, heads, dim, generator=generator)
    keys, values = torch.randn(2, key_heads, n, dim, generator=generator)
    first = torch.randint(0, n, (q,), generator=generator)
    last = torch.maximum(first + 1, torch.randint(1, n + 1, (q,), generator=generator))
    tail = torch.rand(q, n // 3, generator=generator) < 0.5
    if n > 3:
        first[0], last[0], tail[0] = 0, n // 2, False
    last[1:] = n
    return queries, keys, values, Bounds(first, last, tail)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_are_what_rows_read(shape: tuple[int, ...], softcap: float | None) -> None:
    queries, keys, values, bounds = made(*shape)
    columns = range(shape[-1])
    t = 0 if bounds.tail is None else bounds.tail.shape[1]
    for row, (first, last) in enumerate(zip(bounds.first.tolist(), bounds.last.tolist(), strict=True)):
        for j in columns:
            in_tail = j >= shape[-1] - t
            want = first <= j < last and not (in_tail and not bounds.tail[row, j - shape[-1] + t])  # type: ignore[index]
            assert bool(bounds.allowed(shape[-1])[row, j]) is want
    readable = bounds.allowed(shape[-1]).any(1)
    want = exact(queries, keys, values, bounds.allowed(shape[-1]), 0.2, softcap)
    got, lse = reference.read(queries, Segment.dense(keys, values, bounds), 0.2, softcap)
    assert (got[readable] - want[readable]).abs().max() < 2e-6  # fp32, sums of up to 129 terms of size 1
    assert (lse[~readable] == float("-inf")).all()
    assert (got[~readable] == 0).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_is_the_same_whole_in_parts_and_strict(shape: tuple[int, ...], softcap: float | None) -> None:
    queries, keys, values, _ = made(*shape)
    q, n = shape[0], shape[-1]
    last = torch.arange(n - q + 1, n + 1).clamp(min=1)
    want = exact(queries, keys, values, torch.arange(n) < last[:, None], 0.2, softcap)

    def cut(a: int, b: int) -> Segment:
        return Segment.dense(keys[:, a:b], values[:, a:b], Bounds(torch.zeros_like(last), (last - a).clamp(0, b - a)))

    cuts = sorted({0, n // 3, n // 2, n})
    parts = [cut(a, b) for a, b in pairwise(cuts)]
    for got in (
        attend(queries, [cut(0, n)], 0.2, softcap),
        attend(queries, iter(parts), 0.2, softcap),
        attend(queries, reversed(parts), 0.2, softcap),
        attend_strictly(queries, parts, 0.2, softcap),
    ):
        assert (got - want).abs().max() < 2e-6


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sink_is_a_column_without_a_value(shape: tuple[int, ...], softcap: float | None) -> None:
    queries, keys, values, _ = made(*shape)
    n, sinks = shape[-1], torch.randn(shape[1], generator=torch.Generator().manual_seed(4)) * 3
    want = torch.empty(queries.shape, dtype=torch.float64)
    for head in range(shape[1]):
        scores = queries[:, head].double() @ keys[head // (shape[1] // shape[2])].double().T * 0.2
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(torch.cat((scores, sinks[head].double().expand(len(scores), 1)), 1), -1)
        want[:, head] = weights[:, :-1] @ values[head // (shape[1] // shape[2])].double()
    whole = Segment.dense(keys, values)
    parts = [Segment.dense(keys[:, a:b], values[:, a:b], start=a) for a, b in ((0, n // 2), (n // 2, n)) if a < b]
    for got in (
        attend(queries, [whole], 0.2, softcap, sinks),
        attend(queries, iter(parts), 0.2, softcap, sinks),
        attend_strictly(queries, parts, 0.2, softcap, sinks),
    ):
        assert (got - want).abs().max() < 2e-6


def test_flash_and_reference_agree_on_rows_that_read_nothing() -> None:
    queries, keys, values = torch.randn(3, 4, 16), torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    part = Segment.dense(keys, values, Bounds(torch.tensor([0, 20, 5]), torch.tensor([20, 20, 9])))
    for a, b in zip(reference.read(queries, part, 0.25), reference.read_flash(queries, part, 0.25), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    nothing = reference.read_flash(queries, part, 0.25)
    other = reference.read_flash(queries, Segment.dense(keys + 1, values), 0.25)
    assert torch.equal(merge(nothing, other)[0][1], other[0][1])


def test_a_causal_square_takes_no_mask() -> None:
    queries, keys, values = torch.randn(9, 2, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    rows = torch.arange(9)
    want = exact(queries, keys, values, rows <= rows[:, None], 0.25, None)
    got = attend(queries, [Segment.dense(keys, values, Bounds(torch.zeros(9).long(), rows + 1, causal=True))], 0.25)
    assert (got - want).abs().max() < 2e-6


def test_strict_bits_do_not_depend_on_companions() -> None:
    queries, keys, values = torch.randn(8, 9, 64), torch.randn(3, 300, 64), torch.randn(3, 300, 64)
    last = torch.arange(293, 301)
    together = attend_strictly(queries, [Segment.dense(keys, values, Bounds(torch.zeros(8).long(), last))], 0.125)
    for i, end in enumerate(last.tolist()):
        alone = attend_strictly(queries[i : i + 1], [Segment.dense(keys[:, :end], values[:, :end])], 0.125)
        halves = [Segment.dense(keys[:, :100], values[:, :100]), Segment.dense(keys[:, 100:end], values[:, 100:end])]
        assert torch.equal(together[i], alone[0])
        assert torch.equal(attend_strictly(queries[i : i + 1], halves, 0.125), alone)
