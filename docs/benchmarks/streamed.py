"""Weights on disk: plain decoding against the disk's own rate, drafts against plain decoding, and the peak against the
budget, in turns in one process.

    python docs/benchmarks/streamed.py FILE.gguf --memory 800MiB --suite spec_bench.jsonl --output streamed.json

The disk's rate is what the same buffers read when nothing is computed between two layers. Rates are sums over prompts.
The peak is the kernel's count of the process's resident pages (VmHWM), read from outside at its end. With `--check`
another process, with all weights in memory, writes the same texts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from longspec.engine.engine import Engine
from longspec.machine.disk import read_rate
from longspec.machine.system import parse_bytes, processor
from longspec.model.weights.ring import Ring


def disk_rate(ring: Ring, layers: int, passes: int) -> float:
    """Bytes per second of reading what so many passes read; of the file in its order, where no layer is read."""
    if not ring.streamed:
        return read_rate(ring.file.path) or 0.0
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
    rates, reached, different, texts_written = [], [], 0, []
    for text in texts:
        rates.append(disk_rate(ring, decoder.config.group, passes))
        written = []
        for name, drafter in (("plain", "none"), ("drafts", None)):
            session = engine.open(text, max_new_tokens=tokens, drafter=drafter, raw=raw, temperature=0)
            for _ in engine.prefill(session):
                pass
            before, began = ring.file.nbytes_read, perf_counter()
            while session.finish_reason is None:
                engine.step([session])
            seconds, read = perf_counter() - began, ring.file.nbytes_read - before
            written.append([*session.answer])
            own = sums[name]
            own["tokens"] += len(session.answer)
            own["seconds"] += seconds
            own["steps"] += session.stats.steps
            own["read_mb"] = own.get("read_mb", 0) + read / 1e6
            if name == "plain":
                reached.append(read / seconds)
        different += written[0] != written[1]
        texts_written.append(written[0])
        print(text[:40].replace("\n", " "), rates[-1] / 1e6, sums, flush=True)
    plain, drafts = (sums[name]["tokens"] / max(sums[name]["seconds"], 1e-9) for name in sums)
    return {
        "disk_mb_per_second": [round(each / 1e6) for each in rates],
        "plain_mb_per_second": [round(each / 1e6) for each in reached],
        "of_reading_alone": round(sum(reached) / sum(rates), 3),
        "layers_mb_per_pass": ring.streamed / 1e6,
        "plain": {**sums["plain"], "tokens_per_second": plain},
        "drafts": {**sums["drafts"], "tokens_per_second": drafts, "of_plain": drafts / plain},
        "different": different,
        "rows_of_drafts": None if engine.pruner is None else engine.pruner.seen,
        "pruned_rows": engine.pruned_rows,
        "experts": None if pool is None else {"chosen": pool.chosen, "read": pool.missed},
        "written": texts_written,
    }


def streamed(given: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """Under the budget."""
    engine = Engine.load(
        given.model, memory=given.memory, tokens=1024, weights="disk", draft_model=given.draft_model,
        threads=given.threads,
    )  # fmt: skip
    return {"plan": str(engine.plan), **measured(engine, texts, given.tokens, given.passes, raw=not given.suite)}


def in_memory(given: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """The texts alone, by weights in memory."""
    engine, raw = Engine.load(given.model, drafter="none", threads=given.threads), not given.suite
    options: dict[str, Any] = {"max_new_tokens": given.tokens, "raw": raw, "temperature": 0}
    return {"written": [[*engine.generate(text, **options).tokens] for text in texts]}


def alone(what: Any, given: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """Its results in a process of its own, and the most resident pages that it had."""
    context = get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_tell, args=(its, what, given, texts))
    process.start()
    its.close()  # else its end would not be noticed
    found: dict[str, Any] = ours.recv()
    said = Path(f"/proc/{process.pid}/status").read_text()
    ours.send(None)
    process.join()
    high = re.search(r"VmHWM:\s+(\d+) kB", said)
    assert high is not None
    return {**found, "peak_bytes": 1024 * int(high[1])}


def _tell(pipe: Any, what: Any, given: argparse.Namespace, texts: list[str]) -> None:
    pipe.send(what(given, texts))
    pipe.recv()  # it is measured before it ends


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
    parser.add_argument("--threads", type=int)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.suite.read_text().splitlines()] if given.suite else []
    found = [row["turns"][0][: given.characters] for row in rows if row["category"] == given.category]
    texts = found[: given.prompts] or [f"{i} of 9 said no " * 3 for i in range(given.prompts)]
    results = alone(streamed, given, texts)
    written, size, budget = results.pop("written"), os.path.getsize(given.model), parse_bytes(given.memory)
    if given.check:
        theirs = alone(in_memory, given, texts)["written"]
        results["other_than_in_memory"] = sum(one != other for one, other in zip(written, theirs, strict=True))
    machine = {"processor": processor(), "platform": platform.platform(), "threads": torch.get_num_threads()}
    sizes = {"file_bytes": size, "budget_bytes": budget, "file_over_budget": round(size / budget, 2)}
    results |= {"peak_over_budget": round(results["peak_bytes"] / budget, 3)}
    told = {"machine": machine, "model": Path(given.model).name, **sizes, **results}
    given.output.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
