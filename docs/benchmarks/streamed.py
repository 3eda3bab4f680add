"""Weights on disk: plain decoding against the disk's own rate, drafts against plain decoding, and the peak against the
budget, in turns in one process.

    python docs/benchmarks/streamed.py FILE.gguf --memory 800MiB --suite spec_bench.jsonl --output streamed.json

The disk's rate is what the same buffers read when nothing is computed between two layers. Rates are sums over prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from longspec.engine.engine import Engine
from longspec.machine.system import parse_bytes, peak_bytes, processor
from longspec.model.weights.ring import Ring


def disk_rate(ring: Ring, layers: int, passes: int) -> float:
    """Bytes per second of reading what so many passes read."""
    began, before = perf_counter(), ring.file.nbytes_read
    for _ in range(passes):
        for layer in range(layers):
            with ring.held(layer):
                pass
    return (ring.file.nbytes_read - before) / (perf_counter() - began)


def measured(engine: Engine, texts: list[str], tokens: int, passes: int, *, raw: bool) -> dict[str, Any]:
    decoder = engine.model.decoder
    ring, pool = decoder.ring, decoder.pool
    assert ring is not None
    sums: dict[str, dict[str, float]] = {name: {"tokens": 0, "seconds": 0, "steps": 0} for name in ("plain", "drafts")}
    rates, different = [], 0
    for text in texts:
        rates.append(disk_rate(ring, decoder.config.group, passes) if ring.streamed else 0.0)
        written = []
        for name, drafter in (("plain", "none"), ("drafts", None)):
            before = ring.file.nbytes_read
            answer = engine.generate(text, max_new_tokens=tokens, drafter=drafter, raw=raw)
            written.append(answer.tokens)
            own = sums[name]
            own["tokens"] += len(answer.tokens) - 1
            own["seconds"] += answer.timing["decode_s"]
            own["steps"] += answer.speculation["steps"] - 1
            own["read_mb"] = own.get("read_mb", 0) + (ring.file.nbytes_read - before) / 1e6
        different += written[0] != written[1]
        print(text[:40].replace("\n", " "), rates[-1] / 1e6, sums, flush=True)
    rate = sum(rates) / len(rates)
    plain, drafts = (sums[name]["tokens"] / max(sums[name]["seconds"], 1e-9) for name in sums)
    floor = rate / ring.streamed if ring.streamed else None
    return {
        "disk_mb_per_second": [round(each / 1e6) for each in rates],
        "mb_per_pass": ring.streamed / 1e6,
        "tokens_per_second_of_reading_alone": floor,
        "plain": {**sums["plain"], "tokens_per_second": plain, "of_reading_alone": floor and plain / floor},
        "drafts": {**sums["drafts"], "tokens_per_second": drafts, "of_plain": drafts / plain},
        "different": different,
        "rows_of_drafts": None if engine.pruner is None else engine.pruner.seen,
        "pruned_rows": engine.pruned_rows,
        "experts": None if pool is None else {"chosen": pool.chosen, "read": pool.missed},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("--memory", required=True)
    parser.add_argument("--draft-model")
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--category", default="summarization")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.suite.read_text().splitlines()] if given.suite else []
    found = [row["turns"][0][: given.characters] for row in rows if row["category"] == given.category]
    texts = found[: given.prompts] or [f"{i} of 9 said no " * 3 for i in range(given.prompts)]
    engine = Engine.load(given.model, memory=given.memory, tokens=1024, weights="disk", draft_model=given.draft_model)
    assert engine.plan is not None
    results = {
        "machine": {"processor": processor(), "platform": platform.platform(), "threads": torch.get_num_threads()},
        "model": Path(given.model).name,
        "file_bytes": os.path.getsize(given.model),
        "budget_bytes": parse_bytes(given.memory),
        "plan": str(engine.plan),
        **measured(engine, texts, given.tokens, given.passes, raw=not given.suite),
        "peak_bytes": peak_bytes(),
    }
    given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
