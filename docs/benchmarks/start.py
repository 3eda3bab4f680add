"""From a process's start to its first token, and its peak of memory: `longspec run`, seen from outside.

    python docs/benchmarks/start.py smollm2 FILE.gguf ... --output docs/benchmarks/start.json

Models in turns, each once beforehand, so that its file is in the page cache and its kernels are compiled. Beside them
an interpreter that imports torch and nothing else, which no command that computes with torch can begin sooner than.
The first token has come with the first byte on standard output. `cpu_s` is the processor time of the whole process, all
threads: beside other work it says more than the clock does. `stages_s` are the process's own figures. Bytecode is kept,
as it is where packages are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from longspec.machine.files import replaced
from longspec.machine.system import processor
from longspec.model.load import open_model

TORCH = [sys.executable, "-c", "import torch; print(torch.__version__)"]
SETTING = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
PROMPT = "Why is the sky blue?"


def command(model: str, *more: str) -> list[str]:
    program = [sys.executable, "-m", "longspec.cli.main", "run", "--no-server", "-m", model]
    return [*program, "--temperature", "0", "--max-new-tokens", "8", *more, PROMPT]


def began(line: list[str]) -> dict[str, float]:
    """Seconds until the first byte, and what the process took until its end."""
    start = perf_counter()
    process = subprocess.Popen(  # noqa: S603  our own command
        line, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=SETTING
    )
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    seconds = perf_counter() - start
    while os.read(process.stdout.fileno(), 1 << 16):
        pass
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    assert first, line
    assert process.returncode == 0, process.returncode
    return {"first_s": seconds, "cpu_s": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss << 10}


def stages(model: str, *more: str) -> dict[str, float]:
    """The process's own seconds of imports, tokenizer, weights and prompt."""
    said = json.loads(subprocess.check_output(command(model, "--json", *more), env=SETTING))["timing"]  # noqa: S603
    names = ("import_s", "tokenizer_s", "weights_s", "load_s", "prefill_s", "time_to_first_token_s")
    return {name: round(said[name], 3) for name in names if said.get(name) is not None}


def size(model: str) -> int:
    """Bytes of the files that weights are read from."""
    checkpoint = open_model(model).checkpoint
    if checkpoint.gguf is not None:
        return checkpoint.gguf.stat().st_size
    assert checkpoint.folder is not None
    return sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))


def row(runs: list[dict[str, float]]) -> dict[str, Any]:
    firsts = sorted(run["first_s"] for run in runs)
    return {
        "first_s": round(median(firsts), 3),
        "least_and_most_s": [round(firsts[0], 3), round(firsts[-1], 3)],
        "cpu_s": round(median(run["cpu_s"] for run in runs), 3),
        "peak_bytes": max(int(run["peak_bytes"]) for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of each process; its own choice if left out")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    more = () if given.threads is None else ("--threads", str(given.threads))
    lines = {"import torch": TORCH} | {model: command(model, *more) for model in given.model}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in lines}
    for name, line in lines.items():
        print(name, began(line), flush=True)  # warms, and isn't counted
    for _ in range(given.rounds):
        for name, line in lines.items():
            runs[name].append(began(line))
    results = []
    for name, each in runs.items():
        found = {"model": Path(name).name, **row(each)}
        if name in given.model:
            found |= {"file_bytes": size(name), "stages_s": stages(name, *more)}
            found["over_file_bytes"] = found["peak_bytes"] - found["file_bytes"]
        results.append(found)
        print(json.dumps(found), flush=True)
    report = {
        "hardware": {"processor": processor(), "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 2)},
        "rounds": given.rounds,
        "threads": given.threads,
        "results": results,
    }
    replaced(given.output, lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
