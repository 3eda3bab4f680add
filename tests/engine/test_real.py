"""The default model itself: against transformers, and against itself without bets. fp32: no token may differ.

A few prompts of our own always; with LONGSPEC_TEST_DATA set to a folder that holds Spec-Bench's `spec_bench.jsonl`, the
full comparison by `make test-full`: 20 prompts against transformers, 40 prompts x (greedy and 5 seeds) without bets.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import finish
from support.real import default

from longspec.drafters import DRAFTERS
from longspec.engine.engine import Engine
from longspec.engine.options import Options
from longspec.model.files.hub import find

pytestmark = pytest.mark.real

PROMPTS = [
    "A train leaves at 9:40 and arrives at 13:05. It stops for 12 minutes, twice. How long does it move?",
    "Write a polite e-mail that asks a neighbour to turn the music down after ten in the evening.",
    "Repeat this list three times, each time in another order: apple, pear, cherry, plum, quince, apricot.",
    "Summarise in two sentences: The village had two wells. One was deep and cold, the other shallow and warm. "
    "When the summer came and the shallow one fell dry, the people of the lower street walked up to the deep one every "
    "evening, and so the two streets, which had not spoken for years, began to speak again.",
]  # fmt: skip


def spec_bench(count: int) -> list[str]:
    """First turns of Spec-Bench, evenly over its categories."""
    folder = os.environ.get("LONGSPEC_TEST_DATA")
    if not folder:
        pytest.skip("LONGSPEC_TEST_DATA names no folder with spec_bench.jsonl")
    lines = (Path(folder) / "spec_bench.jsonl").read_text().splitlines()
    return [json.loads(line)["turns"][0] for line in lines[:: len(lines) // count]][:count]


@cache
def engine(drafter: str, dtype: str = "fp32", strict: bool = False) -> Engine:
    return Engine(default(dtype, strict), drafter=drafter)


def by_transformers(prompts: list[str], new: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = find("smollm2").folder
    assert folder is not None
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "fp32", dtype=torch.float32)
    config: Any = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    texts = []
    for prompt in prompts:
        tokens = torch.tensor([engine("none").open(prompt).tokens])
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
        texts.append(out[0].tolist())
    return texts


def by_us(
    drafter: str,
    prompts: list[str],
    new: int,
    together: int = 1,
    dtype: str = "fp32",
    strict: bool = False,
    **options: Any,
) -> list[list[int]]:
    made, texts = engine(drafter, dtype, strict), []
    for start in range(0, len(prompts), together):
        sessions = [
            made.open(prompt, key=str(start + i), max_new_tokens=new, **options)
            for i, prompt in enumerate(prompts[start : start + together])
        ]
        texts += finish(made, sessions)
    return texts


def test_greedy_tokens_are_transformers_tokens() -> None:
    assert by_us("none", PROMPTS[:1], 40) == by_transformers(PROMPTS[:1], 40)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 0.8, "top_p": 0.95, "seed": 1}, id="sampled"),
    ],
)
@pytest.mark.full  # the tiny models' matrix has fp32, and below the kernels' own test has this model in bf16 and int8
def test_bets_do_not_change_a_token(options: dict[str, Any]) -> None:
    alone = by_us("none", PROMPTS, 64, **options)
    assert by_us("ngram", PROMPTS, 64, together=4, **options) == alone


_USUAL = ("bf16", "sampled"), ("int8", "greedy")  # test_exact_rows and test_coded have the others, on tiny models


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(dtype, options, id=f"{dtype}-{way}", marks=[] if (dtype, way) in _USUAL else pytest.mark.full)
        for dtype in ("bf16", "int8")
        for way, options in (("greedy", {}), ("sampled", {"temperature": 0.8, "seed": 1}))
    ],
)
def test_no_draft_and_no_company_changes_a_token_in_the_kernels(dtype: str, options: dict[str, Any]) -> None:
    """Trees of fifteen nodes in every step, alone and three texts at a time, against plain decoding one by one."""
    model = default("bf16" if dtype == "bf16" else "auto")
    if model.dtype != dtype or not model.decoder.is_exact:
        pytest.skip(f"no kernels for {dtype} here: {model.decoder.slow}")
    prompts: Any = [(prompt, Options(key=str(i), max_new_tokens=20)) for i, prompt in enumerate(PROMPTS[:3])]
    texts = {}
    for drafter, width in (("none", 1), ("recycle+ngram", 1), ("recycle+ngram+clover2", 3)):
        made = Engine(model, drafter=drafter, control="fixed")
        answers = dict(made.generate_many(prompts, width=width, **options))
        texts[drafter, width] = [answers[i].tokens for i in range(len(prompts))]  # type: ignore[union-attr]
        assert answers[0].exactness == "exact"  # type: ignore[union-attr]
    assert [who for who, tokens in texts.items() if tokens != texts["none", 1]] == []


def test_strict_bf16_has_no_flips() -> None:
    alone = by_us("none", PROMPTS[1:3], 24, dtype="bf16", strict=True)
    assert by_us("ngram", PROMPTS[1:3], 24, together=2, dtype="bf16", strict=True) == alone


@pytest.mark.full
def test_full_greedy_tokens_are_transformers_tokens() -> None:
    prompts = spec_bench(20)
    assert by_us("none", prompts, 200) == by_transformers(prompts, 200)


@pytest.mark.full
@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3, 4])
def test_full_bets_do_not_change_a_token(seed: int | None) -> None:
    prompts = spec_bench(40)
    options: dict[str, Any] = {} if seed is None else {"temperature": 0.8, "top_p": 0.95, "seed": seed}
    plain = by_us("none", prompts, 128, together=8, **options)
    assert by_us("ngram", prompts, 128, together=8, **options) == plain


@cache
def shortest(count: int) -> list[str]:
    """First turns of Spec-Bench, the shortest one of each category."""
    folder = Path(os.environ.get("LONGSPEC_TEST_DATA", "."))
    if not (folder / "spec_bench.jsonl").exists():
        pytest.skip("LONGSPEC_TEST_DATA names no folder with spec_bench.jsonl")
    prompts: dict[str, str] = {}
    for line in (folder / "spec_bench.jsonl").read_text().splitlines():
        said = json.loads(line)
        category, prompt = said["category"], said["turns"][0]
        prompts[category] = min(prompts.get(category, prompt), prompt, key=len)
    return [*prompts.values()][:count]


WAYS: dict[str, Options] = {"greedy": {"temperature": 0}, "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 7}}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["dense", "int8", "dual"])
@pytest.mark.parametrize("way", WAYS)
def test_full_every_drafter_writes_what_none_writes(kind: str, way: str) -> None:
    """12 prompts, one at a time and three at a time. The model has no head of its own."""
    prompts = [(prompt, Options(key=str(i), max_new_tokens=20, **WAYS[way])) for i, prompt in enumerate(shortest(12))]
    texts = {}
    for name in [*(DRAFTERS.keys() - {"mtp", "pipeline"}), "recycle+ngram", "skip+ngram", "model+ngram"]:
        smaller = default("fp32") if "model" in name else None
        made = Engine(
            default("fp32"),
            drafter=name,
            cache=kind,
            options={"draft": smaller} if smaller else {},
            draft_tokens=8,
            control="fixed",
        )
        for width in (1, 3):
            answers = dict(made.generate_many(prompts, width=width))
            texts[name, width] = [answers[i].tokens for i in range(len(prompts))]  # type: ignore[union-attr]
    assert [who for who, tokens in texts.items() if tokens != texts["none", 1]] == []


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_full_prompts_are_answered_alike_in_any_company(way: str) -> None:
    """64 of them: alone, four and sixteen at a time, with bets and without."""
    prompts = [(prompt, Options(key=str(i), max_new_tokens=16, **WAYS[way])) for i, prompt in enumerate(spec_bench(64))]
    texts = {}
    for name in ("none", "auto"):
        made = Engine(default("fp32"), drafter=name)
        for width in (1, 4, 16):
            answers = dict(made.generate_many(prompts, width=width))
            texts[name, width] = [answers[i].tokens for i in range(len(prompts))]  # type: ignore[union-attr]
    assert [who for who, tokens in texts.items() if tokens != texts["none", 1]] == []
