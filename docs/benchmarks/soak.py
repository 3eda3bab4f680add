"""A server under load and under attack: what others wait for, what it keeps in memory, and how it ends.

    python docs/benchmarks/soak.py --model smollm2 --seconds 600 --output docs/benchmarks/soak.json

Starts `longspec serve` for each case. One client asks for a short answer again and again. In the cases of attack the
others come and go in turns of some seconds: its time to the first token beside them is compared with that without them,
so that what else the machine does counts in both. `soak` is all clients at once, of which half go away in the middle of
their answers; every other request has to be answered. Memory is the process's resident size, medians of the second
fifth of the time and of the last. Every server ends by SIGTERM in the midst of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "rivers", "run", "down", "sea", "stones", "light"]
MIB = 1 << 20
TURN = 6.0
"""Seconds of a turn, of which the first sixth isn't counted: what came before may still be read. Where clients wait for
each other it is six times as long.
"""


@dataclass
class Seen:
    """What clients saw: seconds to the first token, answers and refusals, and what became of the others."""

    first: list[tuple[float, float]] = field(default_factory=list)  # when it was asked, and how long it took
    answered: int = 0
    refused: int = 0
    left: int = 0
    lost: list[str] = field(default_factory=list)  # what was never accepted, and why
    cut: int = 0  # answers that were accepted, and had no end


def request(body: bytes, length: int | None = None) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def asked(generator: random.Random, words: int, tokens: int) -> bytes:
    prompt = " ".join(generator.choices(WORDS, k=words))
    return json.dumps({"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0.8}).encode()


async def one(port: int, body: bytes, seen: Seen, leaves: float | None = None) -> None:
    """One request; the client leaves after so many seconds, if any."""
    began, first, accepted, done = perf_counter(), None, False, False
    try:
        async with asyncio.timeout(leaves), connected(port) as (reader, writer):
            writer.write(request(body))
            await writer.drain()
            status = (await reader.readline()).split()[1:2]
            accepted = status == [b"200"]
            seen.refused += status == [b"429"]
            if not accepted:
                seen.lost += [] if status == [b"429"] else [f"status {status}"]
                return
            while line := await reader.readline():
                if first is None and b'"text":"' in line:
                    first = perf_counter() - began
                    seen.first.append((began, first))
                done |= line == b"data: [DONE]\n"
            seen.answered += done
    except TimeoutError:
        seen.left += 1
        return
    except OSError as error:
        seen.lost += [] if accepted else [repr(error)]
    seen.cut += accepted and not done


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def client(port: int, seed: int, seen: Seen, words: int, tokens: int, *, leaving: bool) -> None:
    """Requests one after the other, for as long as it is let."""
    generator = random.Random(seed)
    while True:
        await one(port, asked(generator, words, tokens), seen, generator.uniform(0.05, 1) if leaving else None)
        await asyncio.sleep(generator.uniform(0, 0.2))


async def large(port: int, seed: int) -> None:
    """The largest body, once as a text, once as many values, again and again."""
    bodies = [b'{"prompt": "' + b"word " * (8 * MIB // 5 - 20) + b'"}', b'{"prompt": [' + b"[]," * (8 * MIB // 3 - 20)]
    for number in range(seed, 1 << 30):
        await one(port, bodies[number % 2], Seen())
        await asyncio.sleep(0.1)


async def slow(port: int, seed: int) -> None:
    """A head or a body that comes byte by byte, begun again when the server closes it."""
    while True:
        with suppress(OSError):
            async with connected(port) as (reader, writer):
                for byte in request(b" ", length=5000) if seed % 2 else b"GET /health HTTP/1.1\r\nX: " + b"x" * 999:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.3)
                await reader.read()
        await asyncio.sleep(0.1)


@asynccontextmanager
async def served(model: str, more: list[str]) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A server's process and port."""
    command = [sys.executable, "-m", "longspec.cli.main", "serve", "-m", model, "--port", "0", *more]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        while (found := re.search(rb"http://127.0.0.1:(\d+)/v1", line := await process.stderr.readline())) is None:
            assert line, "the server ended before it listened"
        yield process, int(found[1])
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def ended(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """How it ends on SIGTERM, with whatever is under way."""
    began = perf_counter()
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    said, code = await asyncio.gather(process.stderr.read(), process.wait())
    return {"seconds": round(perf_counter() - began, 2), "exit_code": code, "stderr": said.decode()[-500:]}


@asynccontextmanager
async def going(port: int, others: Sequence[Callable[[int], Awaitable[None]]]) -> AsyncIterator[None]:
    """Clients that go on while the block runs. Raises what one of them failed with: they note what a server does."""
    tasks = [asyncio.ensure_future(each(port)) for each in others]
    try:
        yield
        for task in tasks:
            if task.done():
                await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def case(
    model: str, more: list[str], seconds: float, honest: int, others: Sequence[Callable[[int], Awaitable[None]]]
) -> dict[str, Any]:
    """A server with honest clients, and others who come and go; what the honest ones and the prober saw."""
    async with served(model, more) as (process, port):
        probe, staying, sizes = Seen(), Seen(), list[int]()
        for _ in range(3):
            await one(port, asked(random.Random(0), 8, 4), Seen())
        always = [lambda port: client(port, -1, probe, 8, 4, leaving=False)]
        always += [lambda port, i=i: client(port, i, staying, 16, 48, leaving=False) for i in range(honest)]
        turn, turns = TURN * (6 if honest else 1), list[tuple[bool, float, float]]()
        async with going(port, always):
            for number in range(max(4, round(seconds / turn))):
                there, began = bool(number % 2), perf_counter()
                async with going(port, others if there else []):
                    while perf_counter() < began + turn:
                        await asyncio.sleep(0.5)
                        sizes.append(resident(process.pid))
                turns.append((there, began + turn / 6, began + turn))
            lost = [*probe.lost, *staying.lost]
            async with going(port, others):
                await asyncio.sleep(2)
                ending = await ended(process)
            await asyncio.sleep(1)  # what was sent before the end is read
    first = sorted([*probe.first, *staying.first], key=lambda each: each[1])
    without, beside = (
        [took for at, took in first if any(is_in == there and since <= at < end for is_in, since, end in turns)]
        for there in (False, True)
    )
    return {
        "first_token_s": {"without": spread(without), "beside": spread(beside)},
        "first_token_ratio": median(beside) / median(without),
        **told(probe, staying, lost, sizes, ending),
    }


async def soak(
    model: str, more: list[str], seconds: float, honest: int, others: Sequence[Callable[[int], Awaitable[None]]]
) -> dict[str, Any]:
    """All clients at once, for so long. Rows of finished texts fill what they may have before memory is looked at."""
    async with served(model, [*more, "--prefix-cache", "64"]) as (process, port):
        staying, sizes, end = Seen(), list[int](), perf_counter() + seconds
        always = [lambda port, i=i: client(port, i, staying, 16, 48, leaving=False) for i in range(honest)]
        async with going(port, [*always, *others]):
            while perf_counter() < end:
                await asyncio.sleep(0.5)
                sizes.append(resident(process.pid))
            lost = [*staying.lost]
            ending = await ended(process)
            await asyncio.sleep(1)
    return told(Seen(), staying, lost, sizes, ending)


def spread(times: Sequence[float]) -> dict[str, float]:
    return {"median": median(times), "p95": times[int(len(times) * 0.95)], "count": len(times)}


def told(probe: Seen, staying: Seen, lost: list[str], sizes: list[int], ending: dict[str, Any]) -> dict[str, Any]:
    """What became of requests, memory and server. lost: before its end."""
    fifth = max(1, len(sizes) // 5)
    before, after = median(sizes[fifth : 2 * fifth]), median(sizes[-fifth:])
    return {
        "probes": probe.answered,
        "answered": staying.answered,
        "told_to_come_again": staying.refused,
        "accepted_and_cut": probe.cut + staying.cut,
        "lost": lost[:5],
        "resident_mib": {"early": round(before / MIB, 1), "late": round(after / MIB, 1), "ratio": after / before},
        "end": ending,
    }


def attacks(half: int) -> dict[str, tuple[int, list[Callable[[int], Awaitable[None]]]]]:
    """By name: honest clients, and what the others do."""
    leaving = [lambda port, i=i: client(port, 1000 + i, Seen(), 16, 48, leaving=True) for i in range(half)]
    return {
        "largest bodies": (0, [lambda port: large(port, 0), lambda port: large(port, 1)]),
        "200 slow connections": (0, [lambda port, i=i: slow(port, i) for i in range(200)]),
        "leaving": (half, leaving),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=600, help="of the soak; a case before it takes a fifth")
    parser.add_argument("--clients", type=int, default=64, help="of the soak; half of them leave")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    more = [] if options.threads is None else ["--threads", str(options.threads)]
    found: dict[str, Any] = {}
    cases = attacks(options.clients // 2)
    for name, (honest, others) in cases.items():
        found[name] = asyncio.run(case(options.model, more, options.seconds / 5, honest, others))
        print(name, json.dumps(found[name]), flush=True)
    found["soak"] = asyncio.run(soak(options.model, more, options.seconds, *cases["leaving"]))
    print("soak", json.dumps(found["soak"]), flush=True)
    asked = {name: getattr(options, name) for name in ("model", "seconds", "clients", "threads", "note")}
    if options.output is not None:
        options.output.write_text(json.dumps({**asked, "cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
