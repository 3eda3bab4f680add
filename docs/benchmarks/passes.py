"""What a pass of the default model costs in bf16 and as codes, and what codes do to perplexity.

    python docs/benchmarks/passes.py --text docs/design.md --output docs/benchmarks/passes.json

Milliseconds of a pass with so many rows behind 128 of text, or of so many texts with a row each; dtypes in turns, the
median of all rounds. Perplexity is of the same text's first tokens, in passes of 64 rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from longspec.cache.dense import Dense
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.load import open_model

CONTEXT, PASSES, READ = 128, 20, 64
CASES = [(1, 1), (1, 9), (1, 16), (1, 64), (8, 1), (16, 1)]  # texts, rows of each


def rows_of(decoder: Decoder, caches: list[Dense], tokens: list[int]) -> tuple[Rows, list[Any]]:
    stages = [cache.open() for cache in caches]
    chunks = [
        Chunk(stage, stage.add(range(-1, len(tokens) - 1)), tokens, cache.length, False)
        for cache, stage in zip(caches, stages, strict=True)
    ]
    return Rows.of(chunks, decoder.device), stages


def write(decoder: Decoder, cache: Dense, tokens: list[int]) -> torch.Tensor:
    """Logits of these tokens, which are in the cache then."""
    rows, (stage,) = rows_of(decoder, [cache], tokens)
    logits = decoder.logits(decoder.forward(rows))
    cache.commit(stage, range(len(tokens)))
    return logits


def seconds(decoder: Decoder, texts: int, rows: int) -> list[float]:
    caches = [Dense(decoder.shape) for _ in range(texts)]
    for cache in caches:
        write(decoder, cache, list(range(CONTEXT)))
    taken = []
    for _ in range(PASSES):
        began = perf_counter()
        made, stages = rows_of(decoder, caches, [5] * rows)
        decoder.logits(decoder.forward(made))
        taken.append(perf_counter() - began)
        del stages
    return taken[2:]


def perplexity(decoder: Decoder, tokens: list[int]) -> float:
    cache, total = Dense(decoder.shape), 0.0
    for start in range(0, len(tokens), READ):
        chances = write(decoder, cache, tokens[start : start + READ]).float().log_softmax(-1)
        following = torch.tensor(tokens[start + 1 : start + READ + 1])
        total -= float(chances[: len(following)].gather(1, following[:, None]).sum())
    return math.exp(total / (len(tokens) - 1))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    models = {dtype: open_model("smollm2", dtype=dtype).load() for dtype in ("bf16", "int8")}
    taken: dict[tuple[str, int, int], list[float]] = {}
    for _ in range(given.rounds):
        for texts, rows in CASES:
            for dtype, model in models.items():
                taken.setdefault((dtype, texts, rows), []).extend(seconds(model.decoder, texts, rows))
    tokens = models["bf16"].vocabulary.encode(given.text.read_text(encoding="utf-8"), add_special=False)[: given.tokens]
    result = {
        "what": f"milliseconds of a pass behind {CONTEXT} tokens, and perplexity",
        "model": "smollm2",
        "results": [
            {"dtype": dtype, "texts": texts, "rows": rows, "ms": round(1e3 * median(each), 2)}
            for (dtype, texts, rows), each in taken.items()
        ],
        "text": given.text.name,
        "tokens": len(tokens),
        "perplexity": {dtype: perplexity(model.decoder, tokens) for dtype, model in models.items()},
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "cpus": os.cpu_count()},
        "versions": {"torch": torch.__version__},
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
