"""A chat of twenty turns through the server, with the rows of finished texts kept and without.

    python docs/benchmarks/turns.py --model ~/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --memory 2GiB \
      --output docs/benchmarks/turns.json

Two servers, in turns: one with `--prefix-cache 0`. Of each turn: the prompt's tokens, how many of them the server had,
and how many are new, which are those that the last prompt and answer didn't have, and the answer's last token, which no
pass has read. The server's peak is what the system says of its process.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

THINGS = ["a list", "a dict", "a set", "a tuple", "a string", "a file", "an int", "a float", "a class", "a function"]
QUESTIONS = [
    *(f"In one short sentence: what is {thing} in Python?" for thing in THINGS),
    *(f"And how do I print {thing}? Code only." for thing in THINGS),
]


@contextmanager
def served(arguments: list[str]) -> Iterator[tuple[int, str]]:
    """A server's process and address."""
    command = [sys.executable, "-m", "longspec.cli.main", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603  this interpreter
    assert process.stderr is not None
    try:
        said = ""
        while (found := re.search(r"http://\S+/v1", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process.pid, found[0]
    finally:
        process.terminate()
        process.wait(30)


def ask(address: str, talk: list[dict[str, str]], new: int) -> dict[str, Any]:
    body = json.dumps({"messages": talk, "max_tokens": new, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/chat/completions", body, {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        told: dict[str, Any] = json.load(answer)
    return told


def peak(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--memory", help="of each server, such as 2GiB")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer at most")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    more = [] if options.memory is None else ["--memory", options.memory]
    more += [] if options.threads is None else ["--threads", str(options.threads)]
    turns: list[dict[str, Any]] = []
    talk: list[dict[str, str]] = []
    with ExitStack() as stack:
        keeps = ["--model", options.model, *more]
        (pid, with_rows), (_, without) = (
            stack.enter_context(served([*keeps, *extra])) for extra in ([], ["--prefix-cache", "0"])
        )
        had = 0
        for question in QUESTIONS:
            talk.append({"role": "user", "content": question})
            answers, seconds = [], []
            for address in (with_rows, without):
                began = perf_counter()
                answers.append(ask(address, talk, options.new))
                seconds.append(round(perf_counter() - began, 2))
            [text, same] = [answer["choices"][0]["message"]["content"] for answer in answers]
            usage = answers[0]["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            read = usage["prompt_tokens"] - cached
            new = usage["prompt_tokens"] - had + (1 if had else 0)
            turns.append({
                "prompt": usage["prompt_tokens"], "cached": cached, "read": read, "new": new,
                "same_text": text == same, "seconds": seconds[0], "seconds_without": seconds[1],
            })  # fmt: skip
            print(turns[-1], flush=True)
            had = usage["prompt_tokens"] + usage["completion_tokens"]
            talk.append({"role": "assistant", "content": text})
        most = peak(pid)
    report = {
        "model": Path(options.model).name,
        "memory": options.memory,
        "peak_bytes": most,
        "all_texts_same": all(turn["same_text"] for turn in turns),
        "turns_that_read_more_than_is_new": sum(turn["read"] > turn["new"] for turn in turns),
        "turns": turns,
    }
    print({name: value for name, value in report.items() if name != "turns"})
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
