"""What the limits of `--control entropy` save and lose on prompts that they weren't fitted to (Cerberus, 2410.13344).

    python docs/benchmarks/gate.py smollm2 --suite spec_bench.jsonl --sample 3 --output docs/benchmarks/gate.json

They are fitted as `longspec tune` fits them. Then the first turns of the suite are answered greedily with as many
drafted tokens as may be behind every distribution, and with the limits. Rows are the drafted tokens; nothing here is a
timing, and the texts are the same. `alone` is what the free run's steps say of simpler rules: `gate`, all tokens behind
so many nats at most and none behind more, by the share of the steps that it lets draft; `length`, so many tokens behind
any.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspec.bench.gate import EVERYTHING, Seen, Watched, calibrate
from longspec.bench.harness import read_suite, sample
from longspec.control.policy import Limits
from longspec.drafters.auto import auto, heads_for
from longspec.engine.engine import Engine
from longspec.machine.files import replaced
from longspec.model.load import Model, open_model

TOKENS = 96


def answered(model: Model, drafter: str, prompts: list[str], limits: Limits) -> dict[str, Any]:
    control = Watched(drafter, limits)
    engine = Engine(model, drafter=drafter, cache="dense", control=control)
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
        "seen": control.seen,
    }


def alone(seen: Sequence[Seen]) -> dict[str, list[dict[str, float]]]:
    """Rows saved for each token and tokens lost for each step, if the other steps stay as they are."""
    whole, rows = len(seen) + sum(len(step.kept) for step in seen), sum(step.drafted for step in seen)

    def of(kept: int, drafted: int) -> dict[str, float]:
        tokens = len(seen) + kept
        return {"rows_saved": round(1 - drafted / tokens * whole / rows, 4), "lost": round(1 - tokens / whole, 4)}

    ordered, gate, length = sorted(seen, key=lambda step: step.entropy), [], []
    for share in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5):
        some = ordered[: round(share * len(seen))]
        found = of(sum(len(step.kept) for step in some), sum(step.drafted for step in some))
        gate.append({"steps": share, "nats": round(some[-1].entropy, 3), **found})
    for most in (12, 10, 8, 6, 4, 2):
        found = of(sum(bisect_left(step.kept, most) for step in seen), sum(min(step.drafted, most) for step in seen))
        length.append({"tokens": most, **found})
    return {"gate": gate, "length": length}


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
    gate = calibrate(model, float("inf"), lambda stage, done, total: None)
    prompts = [prompt for some in sample(read_suite(asked.suite), asked.sample).values() for prompt in some]
    free, gated = (answered(model, name, prompts, limits) for limits in (EVERYTHING, gate.limits))
    simpler, _ = alone(free.pop("seen")), gated.pop("seen")
    if free.pop("texts") != gated.pop("texts"):
        raise SystemExit("The texts differ: what is drafted changed what is written.")
    result = {
        "what": "--control entropy with its fitted limits, and without any, on first turns, greedy",
        "model": model.name,
        "dtype": model.dtype,
        "drafter": name,
        "suite": asked.suite.name,
        "prompts": len(prompts),
        "max_new_tokens": TOKENS,
        "limits": gate.limits,
        "fit": {"rows_saved": round(gate.saved, 4), "tokens_per_step_lost": round(gate.lost, 4)},
        "rows_saved": round(1 - gated["drafted_per_token"] / free["drafted_per_token"], 4),
        "tokens_per_step_lost": round(1 - gated["tokens_per_step"] / free["tokens_per_step"], 4),
        "free": free,
        "gated": gated,
        "alone": simpler,
    }
    replaced(asked.output, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
