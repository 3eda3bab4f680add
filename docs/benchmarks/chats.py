"""Chats with a GGUF file against llama.cpp's server, in turns: plainly, with each engine's own speculation, with a
draft model, and behind a long text.

    python docs/benchmarks/chats.py MODEL.gguf --draft DRAFT.gguf --llama-server PATH --suite FILE --output chats.json

PATH is llama.cpp's `llama-server`, built for this processor (docs/benchmarks/coded.py says how). FILE has one object a
line, with `category` and `turns`; the first one of each category is answered, greedily, up to the model's end of text.
All get the same prompt tokens; a rate is tokens after the first over the seconds since it. Each setting of llama.cpp is
a process of its own, which waits while another one works; those of longspec share the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from longspec.bench.harness import read_suite, sample
from longspec.engine.engine import Engine
from longspec.kernels.isa import candidates
from longspec.machine.files import replaced
from longspec.model.load import open_model
from longspec.text.detokenizer import decode

SPECULATION = {
    "llama.cpp": [],
    "llama.cpp ngram-mod": ["--spec-type", "ngram-mod"],
    "llama.cpp draft model": ["--spec-type", "draft-simple", "--spec-draft-model", "{draft}"],
}
Took = tuple[float, float, float]
"""Tokens per second, seconds to the first token, tokens of the prompt per second."""


@contextlib.contextmanager
def server(program: Path, model: Path, draft: Path | None, name: str, context: int) -> Iterator[str]:
    """llama-server with this speculation: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(torch.get_num_threads())
    more = [part.format(draft=draft) for part in SPECULATION[name]]
    command = [program, "-m", model, "--port", str(port), "-t", threads, "-tb", threads, "-c", str(context), "-np", "1"]
    process = subprocess.Popen([*map(str, command), *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{name}: llama-server ended with {process.returncode}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):  # noqa: S310
                break
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def theirs(address: str, prompt: str, tokens: list[int], new: int) -> Took:
    asked = {"prompt": tokens, "n_predict": new, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(  # noqa: S310
        f"{address}/completion", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        timings = json.load(answer)["timings"]
    assert timings["prompt_n"] == len(tokens), timings
    return timings["predicted_per_second"], timings["prompt_ms"] / 1000, timings["prompt_per_second"]


def ours(engine: Engine, prompt: str, tokens: list[int], new: int) -> Took:
    answer = engine.generate(prompt, max_new_tokens=new, raw=True, temperature=0.0)
    first = answer.timing["time_to_first_token_s"]
    return answer.timing["tokens_per_second"], first, len(tokens) / first


def row(case: str, took: dict[str, list[Took]]) -> list[dict[str, Any]]:
    rows = []
    for name, all_of_it in took.items():
        rates = [each[0] for each in all_of_it]
        base = [each[0] for each in took["llama.cpp"]]
        rows.append({
            "case": case,
            "engine": name,
            "tokens_per_second": median(rates),
            "of_llama_cpp": median(rate / other for rate, other in zip(rates, base, strict=True)),
            "first_token_seconds": median(each[1] for each in all_of_it),
            "prompt_tokens_per_second": median(each[2] for each in all_of_it),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--llama-server", required=True, type=Path)
    parser.add_argument("--suite", required=True, type=Path)
    parser.add_argument("--prompts", type=int, default=13, help="at most")
    parser.add_argument("--text", type=Path, help="what long prompts are taken from")
    parser.add_argument("--context", type=int, nargs="*", default=[], help="tokens of long prompts")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args()

    opened = open_model(str(given.model))
    model, vocabulary = opened.load(), opened.vocabulary
    engines = {"none": Engine(model, drafter="none"), "auto": Engine(model)}
    if given.draft is not None:
        engines["draft model"] = Engine(model, options={"draft": open_model(str(given.draft)).load()})
    writers: dict[str, Callable[[str, list[int], int], Took]] = {
        name: lambda *case, engine=engine: ours(engine, *case)  # type: ignore[misc]
        for name, engine in engines.items()
    }
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        for name in SPECULATION:
            if given.draft is not None or "draft" not in name:
                longest = max([2048, *(context + 512 for context in given.context)])
                address = stack.enter_context(server(given.llama_server, given.model, given.draft, name, longest))
                writers[name] = lambda *case, address=address: theirs(address, *case)  # type: ignore[misc]
        names = list(writers)

        def written(texts: list[str], new: int) -> dict[str, list[Took]]:
            took: dict[str, list[Took]] = {name: [] for name in names}
            for i, text in enumerate(texts):
                tokens = vocabulary.encode(text, add_special=True)
                for name in names[i % len(names) :] + names[: i % len(names)]:
                    took[name].append(writers[name](text, tokens, new))
            return took

        first = [turns[0] for turns in sample(read_suite(given.suite), 1).values()][: given.prompts]
        chats = [vocabulary.chat([{"role": "user", "content": text}]) for text in first]
        written(chats[:1], 32)  # warm: the controls have measured what passes cost
        rows += row("chats", written(chats, given.new_tokens))
        for context in given.context:
            tokens = vocabulary.encode(given.text.read_text(encoding="utf-8"), add_special=False)[:context]
            rows += row(f"behind {context:,}", written([decode(vocabulary, tokens)], given.new_tokens))
    isas = candidates()
    about = {
        "what": "chats in turns, greedy, tokens per second after the first", "model": given.model.name,
        "draft": given.draft and given.draft.name, "new_tokens": given.new_tokens, "dtype": model.dtype,
        "threads": torch.get_num_threads(), "isa": isas if isinstance(isas, str) else isas[0][0],
        "machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
    }  # fmt: skip
    text = json.dumps({**about, "results": rows}, indent=1) + "\n"
    replaced(given.output, lambda place: place.write_text(text))


if __name__ == "__main__":
    sys.exit(main())
