"""Whether a file and 0.7 GB are enough to write in, and what the memory plan says beside what a run takes.

    python docs/benchmarks/budget.py smollm2 FILE.gguf ... --output docs/benchmarks/budget.json

Each model answers about the beginning of this repository's design.md under `--memory` of its file's size and 0.7 GB.
The kernel says the process's peak of resident memory; `longspec plan` says its figures before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from longspec.machine.files import replaced
from longspec.model.load import open_model
from longspec.text.prompt import encode

COMMAND = [sys.executable, "-m", "longspec.cli.main"]
DESIGN = Path(__file__).resolve().parents[1] / "design.md"
ROOM = 700_000_000


def answered(line: list[str]) -> tuple[dict[str, Any], int]:
    """What a run says, and its peak in bytes as the kernel counted it."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(line, stdout=out, stdin=subprocess.DEVNULL)  # noqa: S603  our own command
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, line
        out.seek(0)
        said: dict[str, Any] = json.load(out)
    return said, used.ru_maxrss << 10


def measured(model: str, letters: int, new: int) -> dict[str, Any]:
    opened = open_model(model)
    file = opened.checkpoint.largest
    assert file is not None
    prompt = f"Summarise this:\n\n{DESIGN.read_text(encoding='utf-8')[:letters]}"
    context, budget = len(encode(opened.vocabulary, prompt)) + new, file.stat().st_size + ROOM
    wanted = ["--memory", str(budget), "--json"]
    planned = json.loads(subprocess.check_output([*COMMAND, "plan", "-m", model, "-c", str(context), *wanted]))  # noqa: S603
    options = ["--temperature", "0", "--max-new-tokens", str(new), "--no-server", *wanted]
    said, peak = answered([*COMMAND, "run", "-m", model, *options, prompt])
    memory, total = said["memory"], sum(planned["parts"].values())
    return {
        "model": Path(model).name,
        "file_bytes": file.stat().st_size,
        "budget_bytes": budget,
        "tokens": context,
        "written": said["usage"]["completion_tokens"],
        "cache": said["cache"],
        "planned": {"bytes": total, "weights": planned["weights_bytes"], "parts": planned["parts"]},
        "run": {"bytes": peak, "weights": memory["weights_bytes"], "planned_bytes": memory["budget"]["planned_bytes"]},
        "plan_over_run": round(total / peak - 1, 4),
        "weights_plan_over_run": round(planned["weights_bytes"] / memory["weights_bytes"] - 1, 4),
        "run_over_file_bytes": peak - file.stat().st_size,
        "holds": peak <= budget,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="+")
    parser.add_argument("--letters", type=int, default=4000, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    results = []
    for model in given.model:
        results.append(measured(model, given.letters, given.new_tokens))
        print(json.dumps(results[-1]), flush=True)
    report = {"results": results}
    replaced(given.output, lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
