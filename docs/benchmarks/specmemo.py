"""A falling budget: what a plan takes for a long text, how fast that is, and whether the peak stays within it.

    python docs/benchmarks/specmemo.py --model smollm2 --text FILE --output docs/benchmarks/specmemo.json

Five budgets between the least for plain decoding with a dense cache and what the whole of speculation takes, each in a
process of its own (`longspec run`), as a user would: 7,000 tokens, of which the answer is --tokens. They run in turns,
--rounds times. `of_whole` is a budget's tokens per second over those of the largest; `saved` is how much of what
speculation adds (the bytes between the least and the whole) it does without. `forecast` is what `longspec plan` says.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from longspec.machine.system import cores, processor

SHARES = (1.0, 0.65, 0.35, 0.15, 0.0)
"""Of what speculation adds to plain decoding's least bytes."""

_SPARE = 4 << 20
"""What processes differ by when they are planned."""


def command(model: str, dtype: str, threads: int) -> tuple[list[str], list[str]]:
    """The program, and the options that all calls have."""
    return [sys.executable, "-m", "longspec.cli.main"], ["--model", model, "--dtype", dtype, "--threads", str(threads)]


def plan(model: str, dtype: str, threads: int, context: int) -> dict[str, Any]:
    run, given = command(model, dtype, threads)
    done = subprocess.run(  # noqa: S603
        [*run, "plan", *given, "--context", str(context), "--json"], capture_output=True, check=True, text=True
    )
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def written(model: str, dtype: str, threads: int, text: Path, tokens: int, budget: int) -> dict[str, Any]:
    run, given = command(model, dtype, threads)
    asked = ["--no-stdin", "--raw", "-f", str(text), "--max-new-tokens", str(tokens), "--temperature", "0"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(  # noqa: S603
        [*run, "run", *given, *asked, "--weights", "memory", "--memory", str(budget), "--json"],
        capture_output=True,
        check=True,
        text=True,
    )
    answer = json.loads(done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    said = answer["memory"]["budget"]
    return {
        "text": answer["text"],
        "tokens_per_second": answer["timing"]["tokens_per_second"],
        "prefill_s": answer["timing"]["prefill_s"],
        "tokens_per_step": answer["speculation"]["tokens_per_step"],
        "drafter": answer["speculation"]["drafter"],
        "peak_bytes": answer["memory"]["peak_bytes"],
        "peak_outside_bytes": after * 1024 if after > before else None,
        **{name: said[name] for name in ("planned_bytes", "planned_cache", "prefill_rows", "draft_tokens", "without")},
        "notes": said["notes"],
    }


def cut(text: Path, tokens: int, model: str) -> str:
    """So much of a text that it has nearly so many tokens."""
    from longspec.model.load import open_model

    vocabulary = open_model(model, offline=True).vocabulary
    words = text.read_text().split()
    while len(vocabulary.encode(" ".join(words), add_special=True)) > tokens:
        words = words[: len(words) * 49 // 50]
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    what = given.model, given.dtype, given.threads
    planned = plan(*what, given.context)
    dense = [one for one in planned["curve"] if one["cache"] == "dense" and one["weights"] == "memory"]
    whole = next(one["budget_bytes"] for one in reversed(dense) if one["draft_tokens"] == dense[0]["draft_tokens"])
    least = dense[-1]["budget_bytes"]
    budgets = [round(least + share * (whole - least)) + _SPARE for share in SHARES]
    runs: dict[int, list[dict[str, Any]]] = {budget: [] for budget in budgets}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text(cut(given.text, given.context - given.tokens, given.model))
        for _ in range(given.rounds):
            for budget in budgets:
                runs[budget].append(written(*what, text, given.tokens, budget))
                print({**runs[budget][-1], "text": ""}, file=sys.stderr, flush=True)
    rates = {budget: median(one["tokens_per_second"] for one in own) for budget, own in runs.items()}
    results = []
    for share, (budget, own) in zip(SHARES, runs.items(), strict=True):
        fits = [one for one in planned["curve"] if one["budget_bytes"] <= budget]
        results.append(
            {
                "budget_bytes": budget,
                "saved": 1 - share,
                "of_whole": round(rates[budget] / rates[budgets[0]], 3),
                "within": all(one["peak_bytes"] <= budget for one in own),
                "same_text": all(one["text"] == runs[budgets[0]][0]["text"] for one in own),
                "forecast": fits[0] if fits else None,
                "runs": [{name: value for name, value in one.items() if name != "text"} for one in own],
                "tokens_per_second": rates[budget],
            }
        )
    said = {
        "machine": {"processor": processor(), "platform": platform.platform(), "threads": given.threads},
        "model": given.model,
        "dtype": given.dtype,
        "context": given.context,
        "curve": planned["curve"],
        "results": results,
    }
    print(json.dumps(said, indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
