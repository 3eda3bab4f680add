"""A falling budget: what a plan takes for a long text, how fast that is, and whether the peak stays within it.

    python docs/benchmarks/specmemo.py --model smollm2 --text FILE --output docs/benchmarks/specmemo.json

Five budgets between the least for plain decoding with a dense cache and what the whole of speculation takes, each in a
process of its own (`longspec run`), as a user would: 7,000 tokens, of which the answer is --tokens. They run in turns,
--rounds times. `of_whole` is a budget's tokens per second over those of the largest; `saved` is how much of what
speculation adds (the bytes between the least and the whole) it does without. `forecast` is what `longspec plan` says.
`tokens_per_step` is as good a measure of a tree's size, and doesn't depend on who else uses the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
    done = subprocess.run(  # noqa: S603
        [*run, "run", *given, *asked, "--weights", "memory", "--memory", str(budget), "--json"],
        capture_output=True,
        check=True,
        text=True,
    )
    answer = json.loads(done.stdout)
    said, timing = answer["memory"]["budget"], answer["timing"]
    return {
        "text": hashlib.sha256(answer["text"].encode()).hexdigest()[:16],
        "tokens_per_second": timing["tokens_per_second"],
        "prefill_s": timing["prefill_s"],
        "tokens_per_step": answer["speculation"]["tokens_per_step"],
        "drafter": answer["speculation"]["drafter"],
        "peak_bytes": answer["memory"]["peak_bytes"],
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
    parser.add_argument(
        "--share", type=float, action="append", choices=SHARES, help="these alone; the rest another time"
    )
    parser.add_argument("--output", type=Path, required=True, help="runs that it has are kept")
    given = parser.parse_args()
    what = given.model, given.dtype, given.threads
    setting = {"model": given.model, "dtype": given.dtype, "context": given.context, "tokens": given.tokens}
    said = json.loads(given.output.read_text()) if given.output.exists() else {}
    if any(said.get(name) != value for name, value in setting.items()):
        said = {**setting, "curve": plan(*what, given.context)["curve"], "runs": {}}
    said["machine"] = {"processor": processor(), "platform": platform.platform(), "threads": given.threads}
    budgets = budgets_of(said["curve"])
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text(cut(given.text, given.context - given.tokens, given.model))
        for _ in range(given.rounds):
            for share in given.share or SHARES:
                run = written(*what, text, given.tokens, budgets[share])
                said["runs"].setdefault(str(share), []).append(run)
                print({**run, "text": ""}, file=sys.stderr, flush=True)
                said["results"] = [*results(said, budgets)]
                given.output.write_text(json.dumps(said, indent=1) + "\n")
    print(json.dumps(said["results"], indent=1))


def budgets_of(curve: list[dict[str, Any]]) -> dict[float, int]:
    """By its share, a budget with the dense cache."""
    dense = [one for one in curve if one["cache"] == "dense" and one["weights"] == "memory"]
    whole = next(one["budget_bytes"] for one in reversed(dense) if one["draft_tokens"] == dense[0]["draft_tokens"])
    least = dense[-1]["budget_bytes"]
    return {share: round(least + share * (whole - least)) + _SPARE for share in SHARES}


def results(said: dict[str, Any], budgets: dict[float, int]) -> Iterator[dict[str, Any]]:
    """Each budget's runs beside those of the largest."""
    rates = {share: median(one["tokens_per_second"] for one in own) for share, own in said["runs"].items()}
    whole = str(SHARES[0])
    for share, own in said["runs"].items():
        budget = budgets[float(share)]
        yield {
            "budget_bytes": budget,
            "saved": 1 - float(share),
            "draft_tokens": own[0]["draft_tokens"],
            "tokens_per_second": rates[share],
            "of_whole": round(rates[share] / rates[whole], 3) if whole in rates else None,
            "within": all(one["peak_bytes"] <= budget for one in own),
            "same_text": len({one["text"] for some in said["runs"].values() for one in some}) == 1,
            "forecast": next((one for one in said["curve"] if one["budget_bytes"] <= budget), None),
        }


if __name__ == "__main__":
    main()
