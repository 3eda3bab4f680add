"""Batches on a Ray of this machine: whether texts are the same, rates, the driver's memory, and a forecast.

    python docs/benchmarks/scale.py texts|records|overhead|forecast [--records N] [--tokens N] [--output FILE]

Each part runs the command as a process: `texts` writes the same prompts by one process, by two on halves, and by two
actors; `records` sends tiny records through a tiny model; `overhead` sends records that can't be answered, so that
no engine works and what is left is the way there and back; `forecast` measures a hundred prompts, forecasts a thousand,
and runs these. Takes two cores, which nothing else should have.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "longspec.cli.main"]
FOLDER = Path(tempfile.mkdtemp(prefix="longspec-scale-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=("texts", "records", "overhead", "forecast"))
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found = {"texts": texts, "records": records, "overhead": overhead, "forecast": forecast}[given.part](given)
    found["hardware"] = {"machine": platform.machine(), "threads": 1, "cpus": os.cpu_count()}
    found["versions"] = {name: version(name) for name in ("ray", "torch", "transformers")}
    print(json.dumps(found, indent=2))
    if given.output is not None:
        told = json.loads(given.output.read_text()) if given.output.exists() else {}
        name = f"{given.part} {given.dtype}" if given.part == "texts" else given.part
        given.output.write_text(json.dumps({**told, name: found}, indent=2) + "\n")


def prompts(count: int, tokens: Iterable[int]) -> list[dict[str, Any]]:
    """The committed prompts again and again, each time with a number of its own before it."""
    bases = [json.loads(line)["turns"][0] for line in (HERE / "prompts.jsonl").read_text().splitlines()]
    return [
        {"id": i, "prompt": f"{bases[i % len(bases)]} (No. {i})", "max_new_tokens": most}
        for i, most in zip(range(count), tokens, strict=True)
    ]


def written(name: str, lines: Sequence[dict[str, Any]]) -> Path:
    path = FOLDER / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def batch(source: Path, out: str, *more: str) -> subprocess.Popen[bytes]:
    files = [str(source), "-o", str(FOLDER / out), "--summary", str(FOLDER / f"{out}.json")]
    return subprocess.Popen([*COMMAND, "batch", *files, "--threads", "1", "-q", *more])  # noqa: S603  our own command


def done(*processes: subprocess.Popen[bytes]) -> None:
    assert [process.wait() for process in processes] == [0] * len(processes)


def summary(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{out}.json").read_text())
    return found


def answers(*outs: str) -> dict[Any, str]:
    read = [json.loads(line) for out in outs for line in (FOLDER / out).read_text().splitlines()]
    return {line["id"]: line["text"] for line in read}


def writing(out: str) -> float:
    """Seconds of a run's passes, with what lies between them."""
    return float(sum(row["seconds"] for row in summary(out)["passes"]))


def texts(given: argparse.Namespace) -> dict[str, Any]:
    asked = prompts(given.records, [given.tokens] * given.records)
    source, halves = written("in.jsonl", asked), [written(f"half{i}.jsonl", asked[i::2]) for i in (0, 1)]
    more = ["-m", given.model, "--dtype", given.dtype, "--temperature", "0.7", "--seed", "1"]
    done(batch(source, "one", *more))
    began = time.perf_counter()
    done(*(batch(half, f"two{i}", *more) for i, half in enumerate(halves)))
    two_wall, began = time.perf_counter() - began, time.perf_counter()
    done(batch(source, "ray", *more, "--on", "ray", "--actors", "2"))
    ray_wall = time.perf_counter() - began
    tokens = summary("ray")["usage"]["completion_tokens"]
    seconds = [actor["seconds"] for actor in summary("ray")["actors"].values()]
    two, ray = tokens / max(writing("two0"), writing("two1")), tokens / max(seconds)
    return {
        "model": given.model,
        "dtype": given.dtype,
        "records": given.records,
        "max_new_tokens": given.tokens,
        "different_texts": sum(one != answers("ray").get(name) for name, one in answers("one").items()),
        "tokens_per_second": {"one": tokens / writing("one"), "two": two, "ray": ray},
        "ray_over_two": ray / two,
        "seconds_with_start": {"two": two_wall, "ray": ray_wall},
    }


def records(given: argparse.Namespace) -> dict[str, Any]:
    source = written("many.jsonl", [{"id": i, "prompt": f"L{i % 97}"} for i in range(given.records)])
    more = ["-m", given.model, "--dtype", "fp32", "--max-new-tokens", "2", "--drafter", "none"]
    done(batch(source, "plain", *more, "--limit", str(min(given.records, 10_000))))
    plain = writing("plain") / summary("plain")["written"]
    process, rss = batch(source, "ray", *more, "--on", "ray", "--actors", "2"), []
    while process.poll() is None:
        time.sleep(5)
        size = (FOLDER / "ray").stat().st_size if (FOLDER / "ray").exists() else 0
        if size and (pages := _pages(process.pid)):
            rss.append(pages * os.sysconf("SC_PAGE_SIZE") >> 20)
    done(process)
    seconds = max(actor["seconds"] for actor in summary("ray")["actors"].values())
    each = seconds / given.records
    return {
        "records": given.records,
        "written": summary("ray")["written"],
        "driver_mib": {"first": rss[0], "middle": rss[len(rss) // 2], "last": rss[-1], "most": max(rss)},
        "milliseconds_a_record": {"ray": 1e3 * each, "engine": 1e3 * plain, "overhead": 1e3 * (each - plain / 2)},
    }


def overhead(given: argparse.Namespace) -> dict[str, Any]:
    """Of a record, from the difference of two runs, so that starting Ray and its actors doesn't count."""
    took = {}
    for count in (given.records // 10, given.records):
        source = written(f"none{count}.jsonl", [{"id": i, "prompt": ""} for i in range(count)])
        began = time.perf_counter()
        code = batch(source, f"none{count}.out", "-m", given.model, "--on", "ray", "--actors", "2").wait()
        took[count] = time.perf_counter() - began
        lines = sum(1 for _ in (FOLDER / f"none{count}.out").open("rb"))
        assert lines == count, (lines, code)
    few, many = took
    return {
        "records": given.records,
        "seconds": {str(count): seconds for count, seconds in took.items()},
        "milliseconds_a_record": 1e3 * (took[many] - took[few]) / (many - few),
    }


def _pages(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0


def forecast(given: argparse.Namespace) -> dict[str, Any]:
    generator = random.Random(7)
    asked = prompts(given.records, [generator.randint(8, 2 * given.tokens - 8) for _ in range(given.records)])
    more = ["-m", given.model, "--dtype", given.dtype]
    done(batch(written("pilot.jsonl", generator.sample(asked, max(20, given.records // 10))), "pilot", *more))
    plan = [*COMMAND, "plan", "-m", given.model, "--dtype", given.dtype, "--threads", "1", "--json"]
    plan += ["--measured", str(FOLDER / "pilot.json"), "--lengths", str(FOLDER / "pilot")]
    expected = json.loads(subprocess.check_output([*plan, "--texts", str(given.records)]))["batch"]  # noqa: S603
    done(batch(written("all.jsonl", asked), "all", *more))
    seconds, tokens = writing("all"), summary("all")["usage"]["completion_tokens"]
    return {
        "model": given.model,
        "dtype": given.dtype,
        "pilot_records": summary("pilot")["written"],
        "records": given.records,
        "forecast": {"seconds": expected["seconds"], "tokens": expected["tokens"]},
        "run": {"seconds": seconds, "tokens": tokens, "with_start": summary("all")["seconds"]},
        "off_by": expected["seconds"] / seconds - 1,
        "rate_off_by": expected["tokens_per_second"] / (tokens / seconds) - 1,
    }


if __name__ == "__main__":
    main()
