"""What pruning in the middle of a pass saves and costs a dense model whose layers are read from disk.

    python docs/benchmarks/pruned.py --model FILE.gguf 700MiB --suite spec_bench.jsonl --output pruned.json

All texts are written twice, by processes of their own, one with a pruner; `recycle+ngram` always drafts so many tokens.
A dense model's layers are read whole for whatever rows are left: only products can be saved.
"""

from __future__ import annotations

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from longspec.engine.engine import Engine
from longspec.engine.pruning import Pruner
from longspec.machine.system import processor


def measured(path: str, memory: str, texts: list[str], tokens: int, drafted: int, prunes: bool) -> dict[str, Any]:
    """Steps, seconds and rows that left, and the tokens of all texts."""
    engine = Engine.load(
        path, memory=memory, tokens=1024, weights="disk", drafter="recycle+ngram", control="fixed",
        num_speculative_tokens=drafted,
    )  # fmt: skip
    ring = engine.model.decoder.ring
    assert ring is not None
    pruner = engine.pruner = Pruner(engine.model.decoder) if prunes else None
    answers = [engine.generate(text, max_new_tokens=tokens) for text in texts]
    steps = sum(answer.speculation["steps"] - 1 for answer in answers)
    return {
        "mb_per_pass": ring.streamed / 1e6,
        "steps": steps,
        "tokens_per_step": sum(len(answer.tokens) - 1 for answer in answers) / steps,
        "seconds": sum(answer.timing["decode_s"] for answer in answers),
        "rows_of_drafts": 0 if pruner is None else pruner.seen,
        "pruned_rows": 0 if pruner is None else pruner.rows,
        "written": [answer.tokens for answer in answers],
    }


def both(path: str, memory: str, *rest: Any) -> dict[str, Any]:
    """Without a pruner and with one, each in a process of its own, whose memory is the model's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        whole, pruned = (pool.submit(measured, path, memory, *rest, prunes).result() for prunes in (False, True))
    different = sum(one != other for one, other in zip(whole.pop("written"), pruned.pop("written"), strict=True))
    return {"model": Path(path).name, "memory": memory, "whole": whole, "pruned": pruned, "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--model", nargs=2, action="append", required=True, metavar=("FILE", "MEMORY"))
    parser.add_argument("--suite", required=True, type=Path)
    parser.add_argument("--category", nargs="+", default=["summarization", "math_reasoning", "writing"])
    parser.add_argument("--prompts", type=int, default=2, help="of each category")
    parser.add_argument("--characters", type=int, default=1200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--drafted", type=int, default=32)
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.suite.read_text().splitlines()]
    texts = []
    for category in given.category:
        found = [row["turns"][0] for row in rows if row["category"] == category]
        texts += [text[: given.characters] for text in found[: given.prompts]]
    results = {
        "machine": {"processor": processor(), "platform": platform.platform(), "threads": torch.get_num_threads()},
        "tokens": given.tokens,
        "drafted": given.drafted,
        "models": [both(path, memory, texts, given.tokens, given.drafted) for path, memory in given.model],
    }
    given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
