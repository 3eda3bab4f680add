"""What the bound of `--control entropy` saves and loses on prompts that it wasn't fitted to (Cerberus, 2410.13344).

    python docs/benchmarks/gate.py smollm2 --suite spec_bench.jsonl --sample 3 --output docs/benchmarks/gate.json

The bound is fitted as `longspec tune` fits it. Then the first turns of the suite are answered greedily with as many
drafted tokens as may be, behind every distribution and behind those within the bound. Rows are the drafted tokens;
nothing here is a timing, and the texts are the same.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from longspec.bench.gate import Watched, calibrate
from longspec.bench.harness import read_suite, sample
from longspec.drafters.auto import auto, heads_for
from longspec.engine.engine import Engine
from longspec.machine.files import replaced
from longspec.model.load import Model, open_model

TOKENS = 96


def answered(model: Model, drafter: str, prompts: list[str], bound: float) -> dict[str, Any]:
    engine = Engine(model, drafter=drafter, cache="dense", control=Watched(drafter, bound))
    steps = drafted = kept = tokens = idle = 0
    texts = []
    for prompt in prompts:
        session = engine.open(prompt, max_new_tokens=TOKENS, temperature=0)
        for _ in engine.write(session):
            pass
        stats = session.stats
        steps, drafted, kept = steps + stats.steps, drafted + stats.drafted, kept + stats.accepted
        tokens, idle = tokens + len(session.answer), idle + stats.steps_without_a_bet
        texts.append(session.answer)
    return {
        "steps": steps,
        "drafted": drafted,
        "kept": kept,
        "tokens": tokens,
        "steps_without_a_draft": idle,
        "tokens_per_step": tokens / steps,
        "drafted_per_token": drafted / tokens,
        "texts": texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    opened = open_model(asked.model, dtype=asked.dtype, device="cpu")
    opened.set_threads()
    model = opened.load()
    (name, *_) = (spec.name for spec in auto({}, nbytes=model.decoder.nbytes, heads=heads_for(model)))
    gate = calibrate(model, math.inf, lambda stage, done, total: None)
    prompts = [prompt for some in sample(read_suite(asked.suite), asked.sample).values() for prompt in some]
    free, gated = (answered(model, name, prompts, bound) for bound in (math.inf, gate.entropy))
    if free.pop("texts") != gated.pop("texts"):
        raise SystemExit("The texts differ: what is drafted changed what is written.")
    result = {
        "what": "--control entropy with its fitted bound, and without one, on first turns, greedy",
        "model": model.name,
        "dtype": model.dtype,
        "drafter": name,
        "suite": asked.suite.name,
        "prompts": len(prompts),
        "max_new_tokens": TOKENS,
        "bound_in_nats": gate.entropy,
        "fit": {"rows_saved": round(gate.saved, 4), "tokens_per_step_lost": round(gate.lost, 4)},
        "rows_saved": round(1 - gated["drafted_per_token"] / free["drafted_per_token"], 4),
        "tokens_per_step_lost": round(1 - gated["tokens_per_step"] / free["tokens_per_step"], 4),
        "free": free,
        "gated": gated,
    }
    replaced(asked.output, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
