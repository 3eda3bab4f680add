r"""What a drafter gains that another one drafts for: `model+ngram` against `model` (staged speculation, 2308.04623).

    python docs/benchmarks/staged.py --target TARGET --draft DRAFT --suite spec_bench.jsonl --prompts 20 \
        --output docs/benchmarks/staged.json

First turns of the suite, evenly spaced, one at a time, both drafters in turns, greedy, with always as many drafted
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

from longspec.bench.harness import read_suite, sample
from longspec.drafters.spec import parse
from longspec.engine.engine import Engine
from longspec.machine.files import replaced
from longspec.model.load import Model, open_model

TOKENS = 64
DRAFTERS = ("model", "model+ngram")


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


def gain(pairs: list[tuple[dict[str, Any], ...]]) -> float:
    rates = [
        sum(row["tokens"] for row in some) / sum(row["seconds"] for row in some) for some in zip(*pairs, strict=True)
    ]
    return rates[1] / rates[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=20)
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
        "what": "model+ngram against model, first turns, one at a time, greedy, in turns; one thread",
        "target": Path(target.name).name,
        "draft": Path(draft.name).name,
        "dtype": target.dtype,
        "prompts": len(prompts),
        "max_new_tokens": TOKENS,
        "draft_tokens": asked.most,
    }
    for control in asked.control:
        made = {name: Counted(target, draft, name, control, asked.most) for name in DRAFTERS}
        pairs: list[tuple[dict[str, Any], ...]] = []
        for number, prompt in enumerate(prompts):
            order = DRAFTERS if number % 2 else DRAFTERS[::-1]
            took = {name: made[name].write(prompt) for name in order}
            texts = [took[name].pop("text") for name in DRAFTERS]
            if texts[0][: len(texts[1])] != texts[1][: len(texts[0])]:
                raise SystemExit("The texts differ: what is drafted changed what is written.")
            if all(row["tokens"] for row in took.values()):
                pairs.append(tuple(took[name] for name in DRAFTERS))
            chance = random.Random(0)
            drawn = sorted(gain(chance.choices(pairs, k=len(pairs))) for _ in range(1000))
            sums = [total(list(some)) for some in zip(*pairs, strict=True)]
            result[control] = {
                **dict(zip(DRAFTERS, sums, strict=True)),
                "prompts": len(pairs),
                "passes_ratio": round(sums[1]["passes_per_drafted_token"] / sums[0]["passes_per_drafted_token"], 4),
                "speed_ratio": round(gain(pairs), 4),
                "speed_ratio_interval": [round(drawn[25], 4), round(drawn[974], 4)],
            }
            replaced(asked.output, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
