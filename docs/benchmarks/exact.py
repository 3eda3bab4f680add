"""Whether every drafter and every batch size write what plain decoding writes, text by text.

    python docs/benchmarks/exact.py --suite FILE --output docs/benchmarks/exact.json

FILE has one object a line, with `category` and `turns`, as Spec-Bench has them; the first turns of five prompts of each
category are answered. Each text is compared with that of `--drafter none`, written alone: `different` counts those that
aren't the same tokens. Nothing here is a timing.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from longspec.bench.harness import read_suite, sample
from longspec.engine.engine import Engine
from longspec.kernels.isa import candidates
from longspec.machine.files import replaced
from longspec.model.load import open_model

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "seed": 7},
}


def texts(engine: Engine, prompts: list[str], width: int, options: dict[str, Any]) -> tuple[list[Any], float]:
    """The tokens of every answer, and tokens per step of all."""
    answers: list[Any] = [None] * len(prompts)
    steps = committed = 0
    for number, answer in engine.generate_many(prompts, width=width, **options):
        assert not isinstance(answer, Exception), answer
        answers[number] = answer.tokens
        steps += answer.speculation["steps"]
        committed += len(answer.tokens)
    return answers, committed / max(1, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", required=True, type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--drafter", nargs="+", default=["auto", "recycle+ngram", "clover2", "ngram"])
    parser.add_argument("--width", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--prompts", type=int, default=5, help="of each category")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args()
    suite = sample(read_suite(given.suite), given.prompts)
    prompts = [prompt for category in suite.values() for prompt in category]
    rows: list[dict[str, Any]] = []
    for dtype in given.dtype:
        opened = open_model(given.model, dtype=dtype)
        opened.set_threads()
        model = opened.load()
        for name, options in SAMPLING.items():
            options = {**options, "max_new_tokens": given.new_tokens}
            wanted, _ = texts(Engine(model, drafter="none"), prompts, 1, options)
            runs = [(drafter, 1) for drafter in given.drafter] + [
                (d, w) for w in given.width[1:] for d in ("none", "auto")
            ]
            for drafter, width in runs:
                engine = Engine(model, drafter=drafter)
                got, per_step = texts(engine, prompts, width, options)
                different = sum(one != other for one, other in zip(wanted, got, strict=True))
                rows.append({
                    "dtype": dtype, "sampling": name, "drafter": drafter, "texts_at_once": width, "texts": len(prompts),
                    "different": different, "tokens_per_step": round(per_step, 3),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    isas = candidates()
    report = {
        "what": "answers that aren't those of --drafter none, written one at a time, token for token",
        "model": given.model, "max_new_tokens": given.new_tokens, "threads": torch.get_num_threads(),
        "machine": platform.machine(), "instructions": isas if isinstance(isas, str) else isas[0][0],
        "torch": torch.__version__, "results": rows,
    }  # fmt: skip
    replaced(given.output, lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
