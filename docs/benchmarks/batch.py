"""Many texts side by side against one at a time, and against transformers' generate with batches of 8.

    python docs/benchmarks/batch.py --suite spec_bench.jsonl --output docs/benchmarks/batch.json

Same model, prompts and cores, in turns in one run; transformers in bf16 where this engine is in int8. Rates are tokens
over the seconds of decoding: prompts are read before the clock starts; of transformers the time of a run with one new
token is taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers

from longspec.engine.engine import Engine
from longspec.engine.scheduler import Schedule
from longspec.model.files.hub import find
from longspec.model.load import DTYPES, open_model


def ours(engine: Engine, prompts: list[str], new: int, width: int) -> float:
    sessions = [engine.open(prompt, max_new_tokens=new, temperature=0, key=str(i)) for i, prompt in enumerate(prompts)]
    for session in sessions:
        for _ in engine.prefill(session):
            pass
    schedule = Schedule(engine, width)
    for session in sessions:
        schedule.add(session)
    began = perf_counter()
    while len(schedule):
        schedule.step()
    return sum(len(session.answer) for session in sessions) / (perf_counter() - began)


def theirs(model: Any, tokens: list[list[int]], new: int, width: int) -> float:
    written, seconds = 0, 0.0
    for start in range(0, len(tokens), width):
        part = tokens[start : start + width]
        size = max(map(len, part))
        ids = torch.tensor([[2] * (size - len(one)) + one for one in part])
        mask = torch.tensor([[0] * (size - len(one)) + [1] * len(one) for one in part])
        for count, sign in ((1, -1), (new, 1)):
            began = perf_counter()
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=2
            )
            seconds += sign * (perf_counter() - began)
        written += sum(next((i for i, t in enumerate(row) if t == 2), len(row)) for row in out[:, size:].tolist())
    return written / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True, help="lines of JSON with `turns`")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    lines = given.suite.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(lines[i * len(lines) // given.prompts])["turns"][0] for i in range(given.prompts)]
    loaded = open_model("smollm2", dtype=given.dtype).load()
    engines = {name: Engine(loaded, drafter=name) for name in ("none", "auto")}
    folder = find("smollm2").folder
    assert folder is not None
    theirs_in = "fp32" if loaded.dtype == "fp32" else "bf16"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / theirs_in, dtype=DTYPES[theirs_in])
    tokens = [engines["none"].open(prompt).tokens for prompt in prompts]
    ways: dict[str, Callable[[], float]] = {
        "one at a time, none": lambda: ours(engines["none"], prompts, given.new_tokens, 1),
        "one at a time, auto": lambda: ours(engines["auto"], prompts, given.new_tokens, 1),
        "16, none": lambda: ours(engines["none"], prompts, given.new_tokens, 16),
        "16, auto": lambda: ours(engines["auto"], prompts, given.new_tokens, 16),
        "transformers, 8": lambda: theirs(model, tokens, given.new_tokens, 8),
    }
    rounds = []
    for number in range(given.rounds):
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        rates = {name: ways[name]() for name in names}
        rounds.append({name: rates[name] for name in ways})
        print("  ".join(f"{name}: {rate:.0f} tokens/s" for name, rate in rounds[-1].items()), flush=True)

    def ratio(one: str, other: str) -> float:
        return median(rates[one] / rates[other] for rates in rounds)

    result = {
        "what": "tokens per second of decoding, many prompts",
        "model": "smollm2",
        "dtype": loaded.dtype,
        "dtype of transformers": theirs_in,
        "prompts": len(prompts),
        "new_tokens": given.new_tokens,
        "rounds": rounds,
        "ratios": {
            "16 over one at a time, both none": ratio("16, none", "one at a time, none"),
            "16 over one at a time, both auto": ratio("16, auto", "one at a time, auto"),
            "16 with auto over 16 with none": ratio("16, auto", "16, none"),
            "16 with auto over transformers": ratio("16, auto", "transformers, 8"),
        },
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "cpus": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
