"""Plain decoding against transformers' generate: same model, dtype, prompts and cores, measured in turns in one run.

    python docs/benchmarks/plain.py --output docs/benchmarks/plain.json
    python docs/benchmarks/plain.py --text FILE --context 7000 --new-tokens 32 --output docs/benchmarks/plain_7000.json

Each round writes every prompt with both, longspec (`--drafter none`) first in even rounds and second in odd ones. Rates
are tokens after the first over the seconds between the first and the last; the ratio is of each round's rates.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from longspec.engine.engine import Engine
from longspec.model.files.hub import find
from longspec.model.load import DTYPES
from longspec.text.detokenizer import decode

PROMPTS = [
    "A baker makes 36 rolls an hour, and sells two thirds of them at once. How many are left after five hours?",
    "Explain to a child why the moon doesn't fall down.",
    "Write a short story about a lighthouse keeper who is afraid of the dark.",
]


class Clock(BaseStreamer):
    """Takes the time of every token that generate puts out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


def ours(engine: Engine, prompt: str, new: int, *, raw: bool) -> tuple[list[int], float]:
    answer = engine.generate(prompt, max_new_tokens=new, raw=raw)
    return list(answer.tokens), answer.timing["tokens_per_second"]


def theirs(model: Any, tokens: list[int], new: int) -> tuple[list[int], float]:
    clock, given = Clock(), torch.tensor([tokens])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, eos_token_id=2,
        pad_token_id=2, streamer=clock,
    )  # fmt: skip
    times = clock.times[1:]  # the first is the prompt
    return out[0, len(tokens) :].tolist(), (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--text", type=Path, help="a text whose first --context tokens are the one prompt")
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    engine = Engine.load("smollm2", drafter="none", dtype=given.dtype)
    folder = find("smollm2").folder
    assert folder is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / given.dtype, dtype=DTYPES[given.dtype])
    raw = given.text is not None
    prompts = [(prompt, engine.open(prompt).tokens) for prompt in PROMPTS]
    if raw:
        vocabulary = engine.model.vocabulary
        tokens = vocabulary.encode(given.text.read_text(), add_special=False)[: given.context]
        prompts = [(decode(vocabulary, tokens), tokens)]
    rounds = []
    for number in range(-1, given.rounds):  # the first warms up
        rates: dict[str, list[float]] = {"longspec": [], "transformers": []}
        for prompt, tokens in prompts:
            for name in ("longspec", "transformers") if number % 2 == 0 else ("transformers", "longspec"):
                if name == "longspec":
                    rates[name].append(ours(engine, prompt, given.new_tokens, raw=raw)[1])
                else:
                    rates[name].append(theirs(model, tokens, given.new_tokens)[1])
        if number >= 0:
            rounds.append({name: sum(values) / len(values) for name, values in rates.items()})
            print("  ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rounds[-1].items()))
    ratios = [one["longspec"] / one["transformers"] for one in rounds]
    result = {
        "what": "plain decoding, one prompt at a time, against transformers' generate",
        "model": "smollm2",
        "dtype": given.dtype,
        "cache": "dense",
        "prompt_tokens": [len(tokens) for _, tokens in prompts],
        "new_tokens": given.new_tokens,
        "rounds": rounds,
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "cpus": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
