"""The offloaded caches against dense: do they reach what SpeCache (2503.16163) promises?

    python docs/benchmarks/specache.py --text long.md --context 8000 --kind disk --output specache.json

Perplexity within 3 % of dense, a fifth of its bytes on the device, .6 of its tokens per second, and on disk 70 % of the
rows that steps read from the store there before they ask for them. It exits with 1 where one of these isn't met.
Needles take five prompts of `--context` tokens for each kind, and are left out unless `--needles` is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from longspec.bench.cache import CacheWorkload
from longspec.bench.harness import report
from longspec.engine.engine import Engine

KINDS = ["offload", "disk"]


def quiet(stage: str, done: int, total: int) -> None:
    print(stage, file=sys.stderr)


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar of each kind, what was measured, and whether it is met."""
    dense = rows[0]
    found = []
    for row in rows[1:]:
        measured = {
            "perplexity": (row["perplexity"] / dense["perplexity"], 1.03, -1),
            "bytes": (row["bytes_per_token"] / dense["bytes_per_token"], 0.2, -1),
            "speed": (row["tokens_per_second"] / dense["tokens_per_second"], 0.6, 1),
            "there early": (row["there_early"], 0.7, 1),
        }
        for name, (value, bar, sign) in measured.items():
            if name != "there early" or row["kind"] == "disk":
                met = value * sign >= bar * sign
                found.append({"kind": row["kind"], "bar": name, "value": value, "of": bar, "met": met})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--kind", action="append", choices=KINDS, help="beside dense; both, if left out")
    parser.add_argument("--needles", action="store_true")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    engine = Engine.load(asked.model, drafter="none", dtype=asked.dtype, threads=asked.threads)
    text = asked.text.read_text(encoding="utf-8")
    workload = CacheWorkload(engine, text, [asked.context], ["dense", *(asked.kind or KINDS)], needles=asked.needles)
    rows = list(workload.rows(quiet))
    print(workload.table.head, *map(workload.table.line, rows), sep="\n")
    found = bars(rows)
    for each in found:
        print(f"{each['kind']}: {each['bar']} {each['value']:.3f} of {each['of']}{'' if each['met'] else ', not met'}")
    whole = report(workload, rows, None) | {"bars": found}
    if asked.output is not None:
        import json

        asked.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return int(not all(each["met"] for each in found))


if __name__ == "__main__":
    sys.exit(main())
