r"""What a drafter gains that others draft for: `model+ngram` against `model` (staged speculation, 2308.04623).

    python docs/benchmarks/staged.py --target TARGET --draft DRAFT --suite spec_bench.jsonl --prompts 20 \
        --drafter model+ngram --drafter model+recycle+ngram --output docs/benchmarks/staged.json

First turns of the suite, evenly spaced, one at a time, all drafters in turns, greedy, with always as many drafted
tokens as may be and with the default control. Draft passes are those of the draft model behind the prompt; speeds are
by the process's own time, which leaves other processes out, and by the wall clock. The texts are the same.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from longspec.bench.harness import read_suite, rotated, sample
from longspec.drafters.spec import parse
from longspec.engine.engine import Engine
from longspec.machine.files import replaced
from longspec.model.load import Model, open_model

TOKENS = 64
PLAIN = "model"


class Counted:
    """An engine whose draft model's passes are counted."""

    def __init__(self, target: Model, draft: Model, name: str, control: str, most: int) -> None:
        drafter: Any = parse(name, {"draft": draft}).make(target)
        self.passes, forward = 0, drafter.forward

        def counted(rows: Any) -> Any:
            self.passes += 1
            return forward(rows)

        drafter.forward = counted
        self.engine = Engine(target, drafter=drafter, control=control, draft_tokens=most)

    def write(self, prompt: str) -> dict[str, Any]:
        session = self.engine.open(prompt, temperature=0, max_new_tokens=TOKENS)
        for _ in self.engine.prefill(session):
            pass
        self.engine.step([session])  # its draft has read the prompt
        passes, own, wall, tokens = self.passes, time.process_time(), time.perf_counter(), len(session.answer)
        drafted = session.stats.drafted
        for _ in self.engine.write(session):
            pass
        return {
            "passes": self.passes - passes,
            "drafted": session.stats.drafted - drafted,
            "tokens": len(session.answer) - tokens,
            "seconds": time.process_time() - own,
            "wall": time.perf_counter() - wall,
            "text": session.answer,
        }


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {name: sum(row[name] for row in rows) for name in ("passes", "drafted", "tokens", "seconds", "wall")}
    return {
        "tokens": found["tokens"],
        "drafted": found["drafted"],
        "draft_passes": found["passes"],
        "passes_per_drafted_token": round(found["passes"] / max(1, found["drafted"]), 4),
        "tokens_per_second": round(found["tokens"] / found["seconds"], 3),
        "tokens_per_wall_second": round(found["tokens"] / found["wall"], 3),
    }


def gain(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """The second's speed over the first's."""
    one, other = (
        sum(row["tokens"] for row in some) / sum(row["seconds"] for row in some) for some in zip(*pairs, strict=True)
    )
    return other / one


def against(plain: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """A drafter's turns beside those of the draft model alone."""
    pairs, chance = list(zip(plain, other, strict=True)), random.Random(0)
    drawn = sorted(gain(chance.choices(pairs, k=len(pairs))) for _ in range(1000))
    passes = [total(some)["passes_per_drafted_token"] for some in (plain, other)]
    return {
        "passes_ratio": round(passes[1] / passes[0], 4),
        "speed_ratio": round(gain(pairs), 4),
        "speed_ratio_interval": [round(drawn[25], 4), round(drawn[974], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--drafter", action="append", help="against `model`; model+ngram, if left out")
    parser.add_argument("--control", nargs="+", default=["fixed", "goodput"])
    parser.add_argument("--most", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    opened = open_model(asked.target, device="cpu")
    opened.set_threads(1)
    target = opened.load()
    draft = open_model(asked.draft, dtype=target.dtype, device="cpu").load()
    every = [prompt for some in read_suite(asked.suite).values() for prompt in some]
    prompts = sample({"": every}, asked.prompts)[""]
    result: dict[str, Any] = {
        "what": "inner drafters against model alone, first turns, one at a time, greedy, in turns; one thread",
        "target": Path(target.name).name,
        "draft": Path(draft.name).name,
        "dtype": target.dtype,
        "prompts": len(prompts),
        "max_new_tokens": TOKENS,
        "draft_tokens": asked.most,
    }
    drafters = [PLAIN, *(asked.drafter or ["model+ngram"])]
    for control in asked.control:
        made = {name: Counted(target, draft, name, control, asked.most) for name in drafters}
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in drafters}
        for number, prompt in enumerate(prompts):
            took = {name: made[name].write(prompt) for name in rotated(drafters, number)}
            texts = [took[name].pop("text") for name in drafters]
            least = min(map(len, texts))
            if len({tuple(text[:least]) for text in texts}) > 1:
                raise SystemExit("The texts differ: what is drafted changed what is written.")
            if all(row["tokens"] for row in took.values()):
                for name, row in took.items():
                    turns[name].append(row)
            if not turns[PLAIN]:
                continue
            result[control] = {
                "prompts": len(turns[PLAIN]),
                PLAIN: total(turns[PLAIN]),
                **{name: total(turns[name]) | against(turns[PLAIN], turns[name]) for name in drafters[1:]},
            }
            replaced(asked.output, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
