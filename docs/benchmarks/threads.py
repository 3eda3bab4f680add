"""Sixteen threads on one engine against `generate_many`: the same texts, and how many tokens a second.

    python docs/benchmarks/threads.py --output docs/benchmarks/threads.json

Each thread asks for one text after the other, whole or as a stream; `generate_many` writes 16 at a time. In turns in
one process. Beside seconds of the clock there are seconds of the process's threads: on a machine that others use too,
only these compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from longspec.engine.answer import Answer
from longspec.engine.engine import Engine

WIDTH = 16
TASKS = ("Explain", "Describe in three sentences", "List five facts about", "Write a short story about")
THINGS = [
    "rivers",
    "glass",
    "the moon",
    "a lighthouse",
    "bread",
    "spiders",
    "maps",
    "rain",
    "clocks",
    "trains",
    "salt",
    "bridges",
]


def ways(engine: Engine, prompts: list[str], new: int) -> dict[str, Callable[[], list[str]]]:
    """By name: what writes all texts."""

    def many() -> list[str]:
        told = dict(engine.generate_many(prompts, width=WIDTH, max_new_tokens=new))
        answers = [told[number] for number in range(len(prompts))]
        return [answer.text for answer in answers if isinstance(answer, Answer)]

    def threads() -> list[str]:
        with ThreadPoolExecutor(WIDTH) as pool:
            return list(pool.map(lambda prompt: engine.generate(prompt, max_new_tokens=new).text, prompts))

    def streams() -> list[str]:
        with ThreadPoolExecutor(WIDTH) as pool:
            return list(pool.map(lambda prompt: "".join(engine.stream(prompt, max_new_tokens=new)), prompts))

    return {"generate_many": many, "threads": threads, "threads with streams": streams}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--new", type=int, default=96, help="tokens of a text at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    engine = Engine.load(options.model, threads=options.threads)
    prompts = [f"{task} {thing}." for thing in THINGS for task in TASKS]
    alone = [engine.generate(prompt, max_new_tokens=options.new) for prompt in prompts]
    tokens = sum(len(answer.tokens) for answer in alone)
    rates: dict[str, list[dict[str, float]]] = {}
    same: dict[str, bool] = {}
    for _ in range(options.rounds):
        for name, write in ways(engine, prompts, options.new).items():
            began, worked = perf_counter(), process_time()
            texts = write()
            rate = {
                "per_second": tokens / (perf_counter() - began),
                "per_cpu_second": tokens / (process_time() - worked),
            }
            rates.setdefault(name, []).append(rate)
            same[name] = same.get(name, True) and texts == [answer.text for answer in alone]
            print(name, rate, same[name], flush=True)
    found: dict[str, Any] = {name: {"same_texts": same[name], "rounds": each} for name, each in rates.items()}
    for name, each in rates.items():
        for unit in ("per_second", "per_cpu_second"):
            base = rates["generate_many"]
            found[name][f"ratio_{unit}"] = median(a[unit] / b[unit] for a, b in zip(each, base, strict=True))
    report = {
        "model": options.model,
        "processor": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "texts": len(prompts),
        "tokens": tokens,
        "ways": found,
    }
    print(
        json.dumps({name: {k: v for k, v in each.items() if k != "rounds"} for name, each in found.items()}, indent=1)
    )
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
