"""The sampler against exact enumeration, and the noise against its promises."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from longspec.errors import UsageError
from longspec.sampling import sampler
from longspec.sampling.parameters import LEAST_TEMPERATURE, PARAMETERS, Bounds, Sampling, SamplingOptions, without_idle
from longspec.sampling.sampler import choose, gumbel, noise_key, rank, sound

DRAWS = 40_000
ALPHA = 1e-6


def enumerated(logits: Tensor, sampling: Sampling, context: list[int]) -> Tensor:
    """The distribution that the options describe, by the definition, in fp64: [V]."""
    scores = logits.double().clone()
    for token in set(context):
        score = scores[token]
        scores[token] = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
    scores /= sampling.temperature
    order = sorted(range(len(scores)), key=lambda token: -float(scores[token]))
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = {token: math.exp(float(scores[token])) for token in order}
    total, mass, kept = sum(weights.values()), 0.0, []
    for token in order:
        if mass / total >= sampling.top_p:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= sampling.min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    probabilities = torch.zeros_like(scores)
    for token in kept:
        probabilities[token] = weights[token] / total
    return probabilities


CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.1, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.4),
]


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The p-value of counts [V]; cells that expect fewer than 5 are merged into one."""
    expected = probabilities * counts.sum()
    big = expected >= 5
    observed, wanted = counts[big].tolist(), expected[big].tolist()
    if expected[~big].sum() > 0:
        observed, wanted = [*observed, float(counts[~big].sum())], [*wanted, float(expected[~big].sum())]
    return float(stats.chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_draws_follow_the_enumerated_distribution(sampling: Sampling) -> None:
    """Fixed seed, 40,000 draws over 12 tokens, alpha 1e-6, at least 5 expected per cell.

    The deviation that it detects is shown by the last line: with 3% of the probability on another token, which is a
    total variation of 0.03, the same draws are rejected.
    """
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4)) * 1.5
    context = [0, 3, 3, 7]
    keys = [noise_key(7, "text", position) for position in range(DRAWS)]
    contexts = [set(context)] * DRAWS if sampling.penalises else None
    drawn = choose(logits.expand(DRAWS, -1), sampling, keys, contexts)
    probabilities = enumerated(logits, sampling, context)
    counts = torch.bincount(drawn, minlength=12)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square(counts, probabilities) > ALPHA
    best, second = probabilities.topk(2).indices.tolist()
    probabilities[best] -= 0.03
    probabilities[second] += 0.03
    assert chi_square(counts, probabilities) < ALPHA


def test_a_large_vocabulary_keeps_what_its_definition_keeps() -> None:
    """Where the nucleus is wider than the first look, and where it isn't, in one pass."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.stack((torch.randn(3000, generator=generator) * 0.3, torch.randn(3000, generator=generator) * 6))
    sampling = Sampling(temperature=0.9, top_p=0.95)
    allowed = [set(enumerated(row, sampling, []).nonzero()[:, 0].tolist()) for row in logits]
    assert len(allowed[0]) > 1000 > 100 > len(allowed[1])
    for seed in range(200):
        together = choose(logits, sampling, [noise_key(seed, "", 0), noise_key(seed, "", 1)])
        alone = [choose(logits[i : i + 1], sampling, [noise_key(seed, "", i)]) for i in range(2)]
        assert together.tolist() == [int(alone[0]), int(alone[1])]
        assert int(together[0]) in allowed[0]
        assert int(together[1]) in allowed[1]


def unmixed(state: int) -> int:
    """The key that gives token 0 this SplitMix64 state: the inverse of its mixing."""
    whole = (1 << 64) - 1

    def unshifted(value: int, bits: int) -> int:
        result = value
        for _ in range(64 // bits):
            result = value ^ result >> bits
        return result

    state = unshifted(state, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & whole
    state = unshifted(state, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & whole
    key = unshifted(state, 30) - 0x9E3779B97F4A7C15 & whole
    return key - (1 << 64) if key >> 63 else key


def test_the_largest_draw_is_finite() -> None:
    """Infinite noise would write a forbidden token: -inf and inf make a NaN, which torch takes for the greatest."""
    key = unmixed((1 << 64) - 1)
    noise = gumbel([key], torch.arange(4)[None])
    assert noise.isfinite().all()
    assert float(noise[0, 0]) == pytest.approx(53 * math.log(2))
    logits = torch.zeros(1, 300)
    assert choose(logits, Sampling(temperature=1.0), [key]).tolist() == [0]
    assert sampler._choose(logits, Sampling(temperature=1.0), [key]).tolist() == [0]
    logits[0, 0] = float("-inf")
    written = choose(logits, Sampling(temperature=1.0), [key]).tolist()
    assert written != [0]
    assert sampler._choose(logits, Sampling(temperature=1.0), [key]).tolist() == written


@pytest.mark.parametrize("sampling", [*CASES[:-1], Sampling(temperature=0.05), Sampling(temperature=0.7, top_k=100),
                                      Sampling(temperature=2.0, top_p=0.99, min_p=0.001)], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_chooses_what_torch_chooses(
    sampling: Sampling, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat and steep rows, of sizes that are no multiple of a block, some of them mostly forbidden; no two alike, so
    that the best are the same for both.
    """
    generator = torch.Generator().manual_seed(6)
    for size, spread in ((5, 1.0), (200, 0.01), (3001, 0.5), (3001, 3.0), (3001, 30.0)):
        values = torch.tensor(sorted(set(torch.linspace(-spread, spread, size).to(dtype).tolist())), dtype=dtype)
        rows = torch.stack([values[torch.randperm(len(values), generator=generator)] for _ in range(40)])
        rows[7, 3:] = float("-inf")
        keys = [noise_key(1, str(spread), position) for position in range(40)]
        chosen = choose(rows, sampling, keys)
        assert (chosen >= 0).all()
        assert (chosen < rows.shape[1]).all()
        with monkeypatch.context() as patched:
            patched.setattr("longspec.sampling.sampler.library", lambda source: "none")
            assert torch.equal(chosen, choose(rows, sampling, keys))
        assert choose(rows[9:10], sampling, keys[9:10]) == chosen[9]


def test_torch_sorts_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for which the kernel's candidates don't suffice: a memory plan counts copies of one row."""
    logits, keys = torch.randn(5, 3000, generator=torch.Generator().manual_seed(2)), [11, 12, 13, 14, 15]
    sampling, rows, torchs = Sampling(temperature=2.0, top_p=0.99), list[int](), sampler._choose
    want = torchs(logits, sampling, keys)

    def counted(some: Tensor, *rest: Any) -> Tensor:
        rows.append(len(some))
        return torchs(some, *rest)

    if sampler.looks_in_place():
        monkeypatch.setattr(sampler, "_choose", counted)
        assert choose(logits, sampling, keys).tolist() == want.tolist()
        assert rows == [1] * 5


def test_noise_is_standard_gumbel_and_its_own_for_each_key() -> None:
    tokens = torch.arange(50_000)[None]
    noise = gumbel([noise_key(0, "", 0), noise_key(0, "", 1), noise_key(1, "", 0), noise_key(0, "b", 0)], tokens)
    for row in noise:
        assert stats.kstest(row.numpy(), "gumbel_r").pvalue > ALPHA
    correlations = torch.corrcoef(noise) - torch.eye(4)
    assert correlations.abs().max() < 6 / math.sqrt(50_000)


def test_noise_is_a_function_of_its_place_alone() -> None:
    """The constants are fixed: the same seed must give the same text in every later version, on every device."""
    assert noise_key(0, "", 0) == 4851894837794156939
    noise = gumbel([noise_key(0, "", 0)], torch.tensor([[0, 1, 49151]]))
    assert noise[0].tolist() == pytest.approx([2.5342783527512993, -0.2643183760869614, 3.657292271169503], abs=1e-12)
    many = gumbel([noise_key(3, "x", 9), noise_key(0, "", 0)], torch.arange(60_000)[None])
    assert torch.equal(many[1:, [0, 1, 49151]], noise)


def test_greedy_takes_the_first_of_the_best() -> None:
    assert choose(torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]]), Sampling(), []).tolist() == [1, 0]


def test_a_penalty_moves_each_row_by_its_own_context() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]] * 2)
    sampling = Sampling(repetition_penalty=1.5)
    assert choose(logits, sampling, [], [{0}, {1, 2}]).tolist() == [1, 0]
    assert logits.tolist() == torch.tensor([[2.0, 1.9, -1.0]] * 2).tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.0),
     ("repetition_penalty", 0.0), ("repetition_penalty", math.inf)],
)  # fmt: skip
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_a_checkpoints_defaults_come_below_what_is_given() -> None:
    defaults = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1, "max_length": 9}
    assert Sampling.over(defaults, {}) == Sampling(0.6, 0, 0.95, 0.0, 1.1)
    assert Sampling.over(defaults, {"top_p": 0.5, "seed": 3}) == Sampling(0.6, 0, 0.5, 0.0, 1.1, 3)
    assert Sampling.over({"temperature": 0.6}, {}).is_greedy
    assert Sampling.over({"do_sample": True}, {}).temperature == 1.0
    with pytest.raises(UsageError, match="top_p has no effect"):
        Sampling.over({}, {"top_p": 0.9})


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3}])
def test_a_part_of_the_vocabulary_is_ranked_as_the_whole_without_the_rest(options: dict[str, float]) -> None:
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    some = torch.tensor([i for i in range(60) if i % 3])
    whole = torch.full_like(logits, float("-inf"))
    whole[:, some] = logits[:, some]
    rest = (Sampling(**options), [5, 6, 7, 8], [{1, 2, 3}, {40}, set(range(60)), {0}], 3)  # type: ignore[arg-type]
    for got, want in zip(rank(logits[:, some], *rest, some), rank(whole, *rest), strict=True):
        torch.testing.assert_close(got, want)


def test_every_parameter_is_an_option_of_a_text() -> None:
    names = [field.name for field in dataclasses.fields(Sampling)]
    assert list(PARAMETERS) == names
    assert list(SamplingOptions.__annotations__) == names


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (Bounds(float, least=0, most=2), "a number, 0 or more and at most 2"),
        (Bounds(float, least=0, most=1, open_below=True), "a number above 0 and at most 1"),
        (Bounds(float, least=0, most=1, open_above=True), "a number, 0 or more and below 1"),
        (Bounds(int, least=1, most=64), "a whole number, 1 to 64"),
        (Bounds(int), "a whole number"),
    ],
)
def test_bounds_say_what_they_hold(bounds: Bounds, words: str) -> None:
    assert bounds.number == words
    assert bounds.hold(1) == (not bounds.open_above)
    assert not bounds.hold(math.inf)
    assert not bounds.hold(math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {}])
def test_tiny_temperatures_do_not_overflow(dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits = torch.randn(3, 500, dtype=dtype) * 30
    best = logits.float().argmax(-1)
    keys = [noise_key(1, "a", position) for position in range(3)]
    for temperature in (5e-324, 1e-38, 1e-10, 9.9e-4, LEAST_TEMPERATURE):
        sampling = Sampling(temperature=temperature, **options)
        assert sampling.is_greedy == (temperature < LEAST_TEMPERATURE)
        for chosen in (
            choose(logits, sampling, keys),
            sampler._choose(logits, Sampling(LEAST_TEMPERATURE, **options), keys),
        ):
            assert (
                logits.float().gather(1, chosen[:, None])[:, 0].tolist()
                == logits.float().gather(1, best[:, None])[:, 0].tolist()
            )
        tokens, chances = rank(logits, sampling, keys, None, 4)
        assert torch.isfinite(chances).all()
        assert logits.gather(1, tokens)[:, 0].tolist() == logits.gather(1, best[:, None])[:, 0].tolist()
    assert without_idle({"temperature": 1e-9, "top_p": 0.5}) == {"temperature": 1e-9}


def test_a_tiny_penalty_does_not_overflow() -> None:
    """What is divided by 1e-38 would be infinite, and the difference of two such logits NaN."""
    logits = torch.linspace(-50, 90, 700)[torch.randperm(700)].repeat(64, 1)
    seen = [[3, 4]] * 64
    keys = [noise_key(1, "", i) for i in range(64)]
    sampling = Sampling(temperature=LEAST_TEMPERATURE, top_p=0.9, repetition_penalty=1e-38)
    likely = {token for token in (3, 4) if logits[0, token] > 0} or set(range(700))
    assert {*choose(logits, sampling, keys, seen).tolist()} <= likely
    assert bool(rank(logits, sampling, keys, seen, 1)[1].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_nothing_can_be_chosen_from(dtype: torch.dtype) -> None:
    values = [0.0, math.inf, -math.inf, math.nan, -math.nan, 3e38, -3e38]
    logits = torch.randn(len(values), 300).to(dtype)
    logits[torch.arange(len(values)), torch.arange(len(values)) * 40] = torch.tensor(values).to(dtype)
    assert sound(logits).tolist() == [True, False, True, False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_are_ranked_by_their_probability(temperature: float, dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 700, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    tokens, chances = rank(logits, Sampling(temperature=temperature), [1, 2, 3], None, 5)
    scores = logits.double() / (temperature or 1.0)
    if temperature:
        scores = scores.log_softmax(-1) + gumbel([1, 2, 3], torch.arange(700)[None])
        best = logits.float().topk(128).indices
        scores = torch.full_like(scores, -torch.inf).scatter(1, best, scores.gather(1, best))
    want = scores.softmax(-1).topk(5)
    torch.testing.assert_close(chances.double(), want.values, atol=1e-5, rtol=1e-4)
    if dtype == torch.float32 or temperature:  # rows in bf16 tie
        assert torch.equal(tokens, want.indices)
