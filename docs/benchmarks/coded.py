"""Passes over GGUF files of codes, by rows; and plain decoding against llama.cpp's, in turns.

    python docs/benchmarks/models.py build/models
    python docs/benchmarks/coded.py build/models/*.gguf --llama-bench PATH --output docs/benchmarks/coded.json

PATH is llama.cpp's own `llama-bench`, built for this processor (cmake -DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release).
GCC 12 builds its AMX code wrongly, and clang 14 leaves that out unless it is given -D__AMX_INT8__=1 -D__AMX_TILE__=1.
In each round both write as many tokens from an empty prompt, and read a prompt of as many. Rates are medians of the
rounds, ratios are of each round's rates.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from longspec.cache import Dense
from longspec.kernels.isa import candidates
from longspec.machine.bandwidth import memory_rate
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.load import open_model

ROWS = (1, 2, 4, 8, 16, 64)


def timed(decoder: Decoder, cache: Dense, count: int) -> float:
    """Seconds of one pass of `count` positions after the cache, which keeps them, and of the last one's logits."""
    stage = cache.open()
    chunk = Chunk(stage, stage.add(range(-1, count - 1)), [100 + i % 50 for i in range(count)], cache.length, False)
    began = perf_counter()
    with torch.inference_mode():
        decoder.logits(decoder.forward(Rows.of([chunk], decoder.device))[-1:])
        cache.commit(stage, range(count))
    return perf_counter() - began


def ours(decoder: Decoder, tokens: int) -> tuple[float, float]:
    """Tokens per second of plain decoding, and of reading a prompt."""
    cache = Dense(decoder.shape)
    timed(decoder, cache, 1)
    wrote = sum(timed(decoder, cache, 1) for _ in range(tokens))
    return tokens / wrote, tokens / timed(decoder, Dense(decoder.shape), tokens)


def theirs(program: Path, path: Path, tokens: int) -> tuple[float, float]:
    threads = str(torch.get_num_threads())
    command = [str(program), "-m", str(path), "-t", threads, "-p", str(tokens), "-n", str(tokens), "-r", "1"]
    done = subprocess.run([*command, "-o", "json"], capture_output=True, text=True, check=True)  # noqa: S603
    rates = {bool(entry["n_gen"]): entry["avg_ts"] for entry in json.loads(done.stdout)}
    return rates[True], rates[False]


def measured(path: Path, program: Path | None, tokens: int, rounds: int) -> dict[str, Any]:
    model = open_model(str(path)).load()
    decoder = model.decoder
    passes = {rows: median(timed(decoder, Dense(decoder.shape), rows) for _ in range(9)) for rows in ROWS}
    report: dict[str, Any] = {
        "file": path.name,
        "dtype": model.dtype,
        "bytes_of_a_pass": decoder.pass_nbytes,
        "pass_ms": {rows: round(1e3 * seconds, 2) for rows, seconds in passes.items()},
        "gigabytes_per_second": round(decoder.pass_nbytes / passes[1] / 1e9, 2),
        "load_s": round(model.seconds["weights_s"], 2),
    }
    mine, peer = [], []
    for _ in range(rounds):
        mine.append(ours(decoder, tokens))
        if program is not None:
            peer.append(theirs(program, path, tokens))
    for i, what in enumerate(("written", "read")):
        report[f"{what}_per_second"] = round(median(rates[i] for rates in mine), 2)
        if peer:
            report[f"llama_cpp_{what}_per_second"] = round(median(rates[i] for rates in peer), 2)
            ratios = [a[i] / b[i] for a, b in zip(mine, peer, strict=True)]
            report[f"{what}_ratios"] = [round(ratio, 3) for ratio in ratios]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found, rate = candidates(), memory_rate()
    report = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "instructions": found if isinstance(found, str) else found[0][0],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "read_gigabytes_per_second": rate and round(rate / 1e9, 2),
        "files": [measured(path, given.llama_bench, given.tokens, given.rounds) for path in given.files],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
