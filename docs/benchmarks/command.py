"""How often `longspec command` does what was asked: the requests of tests/cli/command.toml, each suggestion run in a
scratch folder as the tests run it.

    python docs/benchmarks/command.py --model ~/models/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf \
      --output docs/benchmarks/command.json

`requests` chose examples and weights (with the default model), `more` and `fresh` were set aside. A suggestion that is
flagged as dangerous isn't run, and counts as wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "cli")]

from test_command import DATA, does, scratch  # noqa: E402

from longspec.cli.shell.environment import Place  # noqa: E402
from longspec.cli.shell.suggest import suggest  # noqa: E402
from longspec.engine.engine import Engine  # noqa: E402


def measured(engine: Engine, kind: str, folder: Path) -> dict[str, Any]:
    """What became of each request of a kind that can be checked."""
    asked = [each for each in DATA[kind] if "want" in each or "made" in each]
    place, answers, seconds = Place("bash", "Linux", folder=scratch(folder / kind)), [], 0.0
    for number, each in enumerate(asked):
        began = perf_counter()
        lines = suggest(engine, each["ask"], place)
        seconds += perf_counter() - began
        right = bool(lines) and does(lines[0], each, folder / f"{kind}{number}")
        answers.append({"ask": each["ask"], "line": lines[0] if lines else None, "right": right})
        print(kind, answers[-1], flush=True)
    right = sum(answer["right"] for answer in answers)
    return {"asked": len(asked), "right": right, "seconds": round(seconds, 1), "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kind", nargs="+", default=["requests", "more", "fresh"])
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    engine = Engine.load(os.path.expanduser(options.model), threads=options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = {kind: measured(engine, kind, Path(folder)) for kind in options.kind}
    report = {
        "model": Path(engine.model.name).name,
        "dtype": engine.model.dtype,
        "processor": platform.machine(),
        **found,
    }
    print({kind: f"{each['right']} of {each['asked']}" for kind, each in found.items()})
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
