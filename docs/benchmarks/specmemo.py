"""A falling budget: what a plan takes for a long text, whether the peak stays within it, and how fast the rest drafts.

    python docs/benchmarks/specmemo.py --model smollm2 --text FILE --suite spec_bench.jsonl --sample 2 --threads 1 \
        --output docs/benchmarks/specmemo.json

Five budgets between the least for plain decoding with a dense cache and what the whole of speculation takes, each in a
process of its own (`longspec run`), as a user would: `--context` tokens, of which the answer is --tokens, by a text and
a question of the suite behind it. What a process has when it is planned is learned from a run that is thrown away, so
that a budget has no slack beside its share; `saved` is by the bytes that came out: of those between the least and the
whole, the share that the plan does without.

Then the drafters and the tree that each budget left write the suite's first turns, in turns, in one process, each
--answer tokens. `of_whole` is a budget's tokens per second, by the process's own time, over those of the largest.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longspec.bench.harness import read_suite, sample
from longspec.engine.engine import Engine
from longspec.machine.system import cores, processor
from longspec.model.load import open_model

SHARES = (1.0, 0.65, 0.35, 0.15, 0.0)
"""Of what speculation adds to plain decoding's least bytes."""


def command(given: argparse.Namespace, name: str, *options: str) -> dict[str, Any]:
    """The object that a command prints."""
    own = ["--model", given.model, "--dtype", given.dtype, "--threads", str(given.threads), "--json"]
    program = [sys.executable, "-m", "longspec.cli.main", name, *own, *options]
    done = subprocess.run(program, capture_output=True, check=True, text=True)  # noqa: S603
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def written(given: argparse.Namespace, text: Path, budget: int) -> dict[str, Any]:
    """What a run under a budget planned and took."""
    asked = ["--no-stdin", "--raw", "-f", str(text), "--max-new-tokens", str(given.tokens), "--temperature", "0"]
    answer = command(given, "run", *asked, "--weights", "memory", "--memory", str(budget))
    said = answer["memory"]["budget"]
    return {
        "budget_bytes": budget,
        "peak_bytes": answer["memory"]["peak_bytes"],
        "drafter": answer["speculation"]["drafter"],
        "tokens_per_step": answer["speculation"]["tokens_per_step"],
        **{name: said[name] for name in ("planned_bytes", "planned_cache", "prefill_rows", "draft_tokens", "without")},
        "process_bytes": said["parts"]["process"],
        "text": answer["text"],
        "notes": said["notes"],
    }


def ends(curve: list[dict[str, Any]]) -> tuple[int, int]:
    """The least bytes for plain decoding with the dense cache, and for all that may be drafted."""
    dense = [one for one in curve if one["cache"] == "dense" and one["weights"] == "memory"]
    first = dense[0]["drafters"], dense[0]["draft_tokens"]
    whole = [one["budget_bytes"] for one in dense if (one["drafters"], one["draft_tokens"]) == first]
    return dense[-1]["budget_bytes"], min(whole)


def cut(given: argparse.Namespace, question: str) -> str:
    """So much of the text, and the question, that they have nearly so many tokens as there are for a prompt."""
    vocabulary = open_model(given.model, offline=True).vocabulary
    words = given.text.read_text().split()
    most = given.context - given.tokens - len(vocabulary.encode(question, add_special=True))
    while len(vocabulary.encode(" ".join(words), add_special=True)) > most:
        words = words[: len(words) * 49 // 50]
    return f"{' '.join(words)}\n\n{question}\n\n"


def speeds(
    given: argparse.Namespace, runs: dict[float, dict[str, Any]], prompts: list[str]
) -> Iterator[dict[str, Any]]:
    """Behind each prompt: tokens, seconds and steps of each way to draft that the budgets left, so far."""
    opened = open_model(given.model, dtype=given.dtype, device="cpu")
    opened.set_threads(given.threads)
    model = opened.load()
    ways = {way(run): run for run in runs.values()}
    engines = {
        name: Engine(model, drafter=run["drafter"], cache="dense", draft_tokens=run["draft_tokens"] or None)
        for name, run in ways.items()
    }
    sums: dict[str, Any] = {name: {"tokens": 0, "seconds": 0.0, "steps": 0} for name in engines}
    for number, prompt in enumerate(prompts):
        names, texts = [*engines], []
        for name in names[number % len(names) :] + names[: number % len(names)]:
            session = engines[name].open(prompt, max_new_tokens=given.answer, temperature=0)
            for _ in engines[name].prefill(session):
                pass
            began = time.process_time()
            for _ in engines[name].write(session):
                pass
            sums[name]["seconds"] += time.process_time() - began
            sums[name]["tokens"] += len(session.answer)
            sums[name]["steps"] += session.stats.steps
            texts.append(tuple(session.answer))
        if len({*texts}) > 1:
            raise SystemExit("The texts differ: what is drafted changed what is written.")
        yield sums


def way(run: dict[str, Any]) -> str:
    return f"{run['drafter']}, {run['draft_tokens']}"


def results(
    runs: dict[float, dict[str, Any]], least: int, whole: int, sums: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Each budget's run beside the largest. least, whole: bytes without the process's own."""
    rates = {name: found["tokens"] / found["seconds"] for name, found in sums.items() if found["seconds"]}
    first = way(runs[SHARES[0]])
    for share, run in runs.items():
        added = run["planned_bytes"] - run["process_bytes"] - least
        rate = rates.get(way(run))
        yield {
            "asked": share,
            **{name: run[name] for name in ("budget_bytes", "drafter", "draft_tokens", "planned_cache")},
            "added_bytes": added,
            "saved": round(1 - added / (whole - least), 3),
            "within": run["peak_bytes"] <= run["budget_bytes"],
            "tokens_per_second": rate and round(rate, 2),
            "of_whole": rate and round(rate / rates[first], 3),
            "tokens_per_step": rate and round(sums[way(run)]["tokens"] / sums[way(run)]["steps"], 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=2, help="first turns of each category")
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answer", type=int, default=96)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    prompts = [prompt for some in sample(read_suite(given.suite), given.sample).values() for prompt in some]
    planned = command(given, "plan", "--context", str(given.context))
    process = planned["parts"]["process"]
    least, whole = (each - process for each in ends(planned["curve"]))
    runs: dict[float, dict[str, Any]] = {}
    said = {
        "what": "five budgets: what is planned and the peak behind a long text; speed on first turns, greedy, in turns",
        **{name: getattr(given, name) for name in ("model", "dtype", "context", "tokens", "answer")},
        "prompts": len(prompts),
        "machine": {"processor": processor(), "platform": platform.platform(), "threads": given.threads},
        "curve": planned["curve"],
    }
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text(cut(given, prompts[0]))
        process = written(given, text, planned["curve"][0]["budget_bytes"] + (64 << 20))["process_bytes"]
        for share in SHARES:
            runs[share] = written(given, text, round(process + least + share * (whole - least)))
            print({**runs[share], "text": ""}, file=sys.stderr, flush=True)
    said["same_text"] = len({run.pop("text") for run in runs.values()}) == 1
    for sums in speeds(given, runs, prompts):
        said |= {"results": [*results(runs, least, whole, sums)], "runs": runs, "speeds": sums}
        given.output.write_text(json.dumps(said, indent=1) + "\n")
    print(json.dumps(said["results"], indent=1))


if __name__ == "__main__":
    main()
