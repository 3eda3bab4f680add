"""What `longspec plan` forecasts of plain decoding against what a run takes, model by model.

    python docs/benchmarks/forecast.py --case smollm2:int8 --case smollm2:bf16 --output docs/benchmarks/forecast.json

Each case is a model and a dtype. The memory's rate is measured anew before each of them, by as many threads as decode.
`forecast_over_run` is the forecast's tokens per second over the median of the rounds'; `forecast_over_own_time` is the
same by the seconds of the process's own threads, which leaves out those that other processes had the cores;
`passes_over_run` is that of what the rounds before have taught the control's curve, which `plan` calls earlier runs.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from longspec.control.latency import Curve
from longspec.engine.engine import Engine
from longspec.machine.bandwidth import memory_rate
from longspec.machine.system import cores, processor
from longspec.memory.forecast import forecast
from longspec.memory.plan import choice, request_of
from longspec.model.load import open_model

PROMPT = "Tell me how a lighthouse works, and why it was built where it stands. "


def measured(model: str, dtype: str, context: int, tokens: int, rounds: int) -> dict[str, Any]:
    opened = open_model(model, dtype=dtype, device="cpu")
    request = request_of(opened, context, drafter="none")
    told = forecast(request, choice(request, "dense", 512), memory_rate()).report()
    engine = Engine(opened.load(), drafter="auto", cache="dense")
    size = len(engine.model.vocabulary.encode(PROMPT, add_special=True))
    prompt = PROMPT * max(1, (context - tokens) // size)
    rates, own = [], []
    for _ in range(rounds + 1):
        session = engine.open(prompt, raw=True, max_new_tokens=tokens, drafter="none", temperature=0)
        for _ in engine.prefill(session):
            pass
        began, before = perf_counter(), process_time()
        while session.finish_reason is None:
            engine.step([session])
        rates.append(len(session.answer) / (perf_counter() - began))
        own.append(len(session.answer) * torch.get_num_threads() / (process_time() - before))
    rate = median(rates[1:])
    curve = Curve.of(engine.speculator.control.report().get("passes"))
    return {
        "model": Path(model).name,
        "dtype": dtype,
        "context": context,
        "memory_bytes_per_second": told["memory_bytes_per_second"],
        "bytes_per_token": told["bytes_per_token"],
        "forecast": round(told["tokens_per_second"], 2),
        "run": round(rate, 2),
        "forecast_over_run": round(told["tokens_per_second"] / rate, 3),
        "forecast_over_own_time": round(told["tokens_per_second"] / median(own[1:]), 3),
        "passes_over_run": round(1 / curve.seconds(1) / rate, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", required=True, metavar="MODEL:DTYPE")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases = []
    for case in given.case:
        model, _, dtype = case.rpartition(":")
        cases.append(measured(model, dtype, given.context, given.tokens, given.rounds))
        print(cases[-1], flush=True)
    machine = {"processor": processor(), "platform": platform.platform(), "threads": given.threads}
    if given.output is not None:
        given.output.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
