"""A server under load and under attack: what others wait for, what it keeps in memory, and how it ends.

    python docs/benchmarks/soak.py --model smollm2 --seconds 600 --output docs/benchmarks/soak.json

Starts `longspec serve` for each case. One client asks for a short answer again and again: its time to the first token
is compared with that of a server with the same honest clients and no others. `leaving` is the soak: clients of which
half go away in the middle of their answers; every other request has to be answered. Memory is the process's resident
size, medians of the second fifth of the time and of the last.
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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "rivers", "run", "down", "sea", "stones", "light"]
MIB = 1 << 20


@dataclass
class Seen:
    """What clients saw: seconds to the first token, answers and refusals, and those that lost theirs."""

    first: list[float] = field(default_factory=list)
    answered: int = 0
    refused: int = 0
    left: int = 0
    lost: list[str] = field(default_factory=list)


def request(body: bytes, length: int | None = None) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def asked(generator: random.Random, words: int, tokens: int) -> bytes:
    prompt = " ".join(generator.choices(WORDS, k=words))
    return json.dumps({"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0.8}).encode()


async def one(port: int, body: bytes, seen: Seen, leaves: float | None = None) -> None:
    """One request; the client leaves after so many seconds, if any."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, first = perf_counter(), None
    try:
        async with asyncio.timeout(leaves):
            writer.write(request(body))
            await writer.drain()
            status = (await reader.readline()).split()
            if status[1:2] != [b"200"]:
                seen.refused += status[1:2] == [b"429"]
                seen.lost += [] if status[1:2] == [b"429"] else [str(status)]
                return
            done = False
            while line := await reader.readline():
                if first is None and b'"text":"' in line:
                    first = perf_counter() - began
                    seen.first.append(first)
                done |= line == b"data: [DONE]\n"
            seen.answered += done
            seen.lost += [] if done else ["its stream had no end"]
    except TimeoutError:
        seen.left += 1
    except ConnectionError as error:
        seen.lost.append(repr(error))
    finally:
        writer.close()
        with suppress(ConnectionError):
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
        with suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for byte in request(b" ", length=5000) if seed % 2 else b"GET /health HTTP/1.1\r\nX: " + b"x" * 999:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.3)
                await reader.read()
            finally:
                writer.close()


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


async def case(
    model: str, more: list[str], seconds: float, honest: int, others: list[Callable[[int], Awaitable[None]]]
) -> dict[str, Any]:
    """A server with honest clients, and others; what the honest ones and the prober saw."""
    async with served(model, more) as (process, port):
        probe, staying, sizes = Seen(), Seen(), list[int]()
        for _ in range(3):
            await one(port, asked(random.Random(0), 8, 4), Seen())
        running = [client(port, i, staying, 16, 48, leaving=False) for i in range(honest)]
        running += [other(port) for other in others]  # type: ignore[misc]
        tasks = [asyncio.ensure_future(each) for each in [client(port, -1, probe, 8, 4, leaving=False), *running]]
        end = perf_counter() + seconds
        while perf_counter() < end:
            await asyncio.sleep(0.5)
            sizes.append(resident(process.pid))
            for task in tasks:
                if task.done():
                    await task
        counts = (probe.answered, staying.answered, staying.refused, staying.left)
        lost = [*probe.lost, *staying.lost]
        ending = await ended(process)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    fifth = max(1, len(sizes) // 5)
    before, after = median(sizes[fifth : 2 * fifth]), median(sizes[-fifth:])
    first = sorted(probe.first)
    return {
        "first_token_s": {"median": median(first), "p95": first[int(len(first) * 0.95)], "count": len(first)},
        "probes": counts[0],
        "answered": counts[1],
        "told_to_come_again": counts[2],
        "lost": lost[:5],
        "resident_mib": {"early": round(before / MIB, 1), "late": round(after / MIB, 1), "ratio": after / before},
        "end": ending,
    }


def cases(half: int) -> dict[str, tuple[int, list[Callable[[int], Awaitable[None]]]]]:
    """By name: honest clients, and what the others do."""
    leaving = [lambda port, i=i: client(port, 1000 + i, Seen(), 16, 48, leaving=True) for i in range(half)]
    return {
        "quiet": (0, []),
        "largest bodies": (0, [lambda port: large(port, 0), lambda port: large(port, 1)]),
        "200 slow connections": (0, [lambda port, i=i: slow(port, i) for i in range(200)]),
        "staying": (half, []),
        "leaving": (half, leaving),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=600, help="of the soak; a case before it takes a twentieth")
    parser.add_argument("--clients", type=int, default=64, help="of the soak; half of them leave")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    more = [] if options.threads is None else ["--threads", str(options.threads)]
    found: dict[str, Any] = {}
    for name, (honest, others) in cases(options.clients // 2).items():
        seconds = options.seconds if name == "leaving" else max(10.0, options.seconds / 20)
        found[name] = asyncio.run(case(options.model, more, seconds, honest, others))
        base = found["staying" if name == "leaving" else "quiet"]["first_token_s"]["median"]
        found[name]["first_token_ratio"] = found[name]["first_token_s"]["median"] / base
        print(name, json.dumps(found[name]), flush=True)
    report = {"model": options.model, "seconds": options.seconds, "clients": options.clients, "cases": found}
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
