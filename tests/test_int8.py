"""int8 weights: codes near what they stand for, the kernel as the torch form has it, a row's bits its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import oracle, write
from engines import engine, prompts, vocabulary
from passes import write as feed
from test_fused import SHAPES, SIZES, TOKENS, load, logits
from torch import Tensor

from longspec.cache import Dense
from longspec.engine import Engine
from longspec.errors import UsageError
from longspec.model.decoder import Chunk, Decoder, Rows, Skip
from longspec.model.int8 import Coded, smoothing
from longspec.model.load import Model, open_model
from longspec.options import Options


@pytest.fixture(params=SHAPES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, changes = SHAPES[request.param]
    return write(oracle(family, **{**SIZES, **changes}), tmp_path_factory.mktemp("int8"))


def quantized(folder: Path, *, strict: bool = False) -> Decoder:
    made = load(folder, torch.bfloat16, strict=strict)
    made.quantize(TOKENS[:150])
    return made


def test_codes_are_near_what_they_stand_for() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, rows = torch.randn(48, 64, generator=generator), torch.randn(5, 64, generator=generator)
    bias = torch.randn(48, generator=generator)
    coded = Coded(weight, bias)
    assert coded.weight.dtype == torch.int8
    assert (coded.weight * coded.scale[:, None] - weight).abs().max() <= coded.scale.max() / 2 + 1e-7
    want = rows @ weight.T + bias
    assert (coded(rows) - want).pow(2).mean().sqrt() < 0.015 * want.pow(2).mean().sqrt()
    assert torch.equal(coded(rows)[2:3], coded(rows[2:3]))


def test_smoothing_takes_from_the_large_channels_what_it_gives_to_their_weights() -> None:
    """One channel a hundred times the others: its share of the error falls to theirs."""
    generator = torch.Generator().manual_seed(2)
    weight, rows = torch.randn(48, 64, generator=generator), torch.randn(200, 64, generator=generator)
    rows[:, 7] *= 100
    want, s = rows @ weight.T, smoothing(weight, rows.abs().amax(0))
    plain, smooth = Coded(weight)(rows), Coded(weight * s)(rows / s)
    assert (smooth - want).pow(2).mean() < (plain - want).pow(2).mean() / 4


def test_logits_are_near_those_of_bf16(folder: Path) -> None:
    want = logits(load(folder, torch.float32), [10, 1, 64, 125])
    got = logits(quantized(folder), [10, 1, 64, 125])
    # Random weights in narrow layers are hard on codes; the default model is held to a hundredth below.
    assert (got - want).pow(2).mean().sqrt() < 0.15 * want.std()


def test_the_kernel_has_the_same_codes_as_torch(folder: Path) -> None:
    """Both differ from fp32 by the codes, and much less from each other."""
    made = quantized(folder)
    if made.slow is not None:
        pytest.skip(made.slow)
    chunks = [1, 7, 16, 17, 63, 96]
    want = logits(load(folder, torch.float32), chunks)
    got = logits(made, chunks)
    made._fused = None
    theirs = logits(made, chunks)
    assert (got - theirs).pow(2).mean() < (theirs - want).pow(2).mean() / 2


def test_a_row_has_the_same_bits_in_any_company(folder: Path) -> None:
    made = quantized(folder, strict=True)
    want = logits(made, [1] * 200)
    for chunks in ([200], [64, 64, 72], [3, 33, 100, 64]):
        assert torch.equal(logits(made, chunks), want)


@pytest.mark.parametrize("skip", [Skip(frozenset({0}), frozenset()), Skip(frozenset(), frozenset({1}))])
def test_parts_of_layers_can_be_left_out(folder: Path, skip: Skip) -> None:
    """The torch form stands in where the kernel does whole layers only."""

    def without(made: Decoder) -> Tensor:
        stage = Dense(made.shape).open()
        rows = Rows.of([Chunk(stage, stage.add(range(-1, 59)), TOKENS[:60], 0, False)], made.device)
        with torch.inference_mode():
            return made.logits(made.forward(rows, skip=skip)).double()

    got, want = without(quantized(folder)), without(load(folder, torch.float32))
    assert (got - want).pow(2).mean().sqrt() < 0.15 * want.std()


@pytest.mark.parametrize("family", ["gemma3", "olmo2"])
def test_other_norms_are_refused(family: str, tmp_path: Path) -> None:
    made = load(write(oracle(family), tmp_path), torch.bfloat16)
    with pytest.raises(UsageError, match="use bf16"):
        made.quantize(TOKENS)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "seed": 4}])
def test_bets_change_no_token(folder: Path, options: Any) -> None:
    made = quantized(folder, strict=True)
    model = Model("tiny", "int8", made, vocabulary(made.config.vocabulary), (2,), {}, {})
    want = engine(model).generate(prompts(1)[0], raw=True, max_new_tokens=40, **options)
    for drafter in ("ngram", "recycle+ngram", "skip", "exit"):
        got = engine(model, drafter).generate(prompts(1)[0], raw=True, max_new_tokens=40, **options)
        assert got.tokens == want.tokens


@pytest.fixture(scope="module")
def real() -> dict[str, Model]:
    return {dtype: open_model("smollm2", dtype=dtype).load() for dtype in ("bf16", "int8")}


@pytest.mark.real
def test_perplexity_is_within_a_hundredth_of_bf16(real: dict[str, Model]) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "design.md").read_text()
    tokens = real["bf16"].vocabulary.encode(text, add_special=False)[:1500]
    perplexity = {}
    for dtype, model in real.items():
        cache, total = Dense(model.decoder.shape), 0.0
        for start in range(0, 1500, 50):
            with torch.inference_mode():
                made = feed(model.decoder, cache, tokens[start : start + 50]).float().log_softmax(-1)
            following = torch.tensor(tokens[start + 1 : start + 51])
            total -= float(made[: len(following)].gather(1, following[:, None]).sum())
        perplexity[dtype] = math.exp(total / 1499)
    assert abs(perplexity["int8"] / perplexity["bf16"] - 1) < 0.01


@pytest.mark.real
def test_in_int8_bets_change_no_token(real: dict[str, Model]) -> None:
    """Without --strict only attention may round differently; here it doesn't come to a flip."""
    options = Options(max_new_tokens=48, temperature=0)
    plain = Engine(real["int8"], drafter="none").generate("Count to thirty, and say why you stop.", **options)
    assert (
        Engine(real["int8"]).generate("Count to thirty, and say why you stop.", **options).text[:60] == plain.text[:60]
    )
