"""Attention over a prefix on a GPU: the bandwidth that each kernel achieves, as a fraction of a measured device copy.

    python docs/benchmarks/gpu_attention.py --output docs/benchmarks/gpu_attention.json

Llama-3-8B's heads (32 for queries, 8 for keys, 128 channels), bf16 queries. A kernel reads the parts of many layers in
turn, 512 MiB in all, so that none finds its bytes in the L2 cache; the turn is one CUDA graph, so that launches don't
count. A rate is the bytes of keys and values as they lie (codes and scales) over the median of the turns' seconds; a
copy's bytes count twice, read and written. With 16 rows and more the tensor cores' work counts too.

No hardware has run this yet. It ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from longspec.attention import flash, reference, triton
from longspec.cache.codes import Codec, DualCodec
from longspec.cache.stage import BLOCK, Bounds, Segment

HEADS, KEY_HEADS, DIM = 32, 8, 128
CODECS = {"int8": Codec(8, symmetric=True), "int4": Codec(4), "int2": Codec(2), "dual": DualCodec()}
TURN_NBYTES = 512 << 20

Read = Callable[[Tensor, Any, float], tuple[Tensor, Tensor]]


def kernels(device: str, q: int, n: int) -> Iterator[tuple[str, Read, Segment]]:
    """Each kernel that this machine has, and a part of n columns for q rows."""
    keys, values = torch.randn(2, KEY_HEADS, n, DIM, device=device, dtype=torch.bfloat16)
    whole = Segment.dense(keys, values)
    if flash.missing() is None:
        yield "bf16, flash-attn", flash.read, whole
    if reference.has_flash(keys[:, 0], whole, None):
        yield "bf16, torch's flash", reference.read_flash, whole
    yield "bf16", triton.read, whole
    last = torch.full((q,), n, device=device)
    tree = Bounds(torch.zeros_like(last), last, torch.ones(q, q, dtype=torch.bool, device=device).tril())
    yield "bf16, tree", triton.read, Segment.dense(keys, values, tree)
    blocks = (keys.unflatten(1, (-1, BLOCK)), values.unflatten(1, (-1, BLOCK)))
    for name, codec in CODECS.items():
        yield name, triton.read, Segment.coded(codec, codec.encode(*blocks), torch.bfloat16)


def tensors(part: Segment) -> tuple[Tensor, ...]:
    """What is read of a part: its bytes count."""
    return part.tensors


def copied(part: Segment) -> Segment:
    """Another layer's: the same at another place."""
    return replace(part, layers=(tuple(tensor.clone() for tensor in part.tensors),), column=0)


def turns(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` turns of `work`, replayed as a CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and warms up, as a capture asks for
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    seconds = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return seconds[3:]


def copy_rate(repeats: int) -> float:
    """Bytes a second of a device copy, read and written."""
    source = torch.empty(TURN_NBYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * TURN_NBYTES / median(turns(lambda: target.copy_(source), repeats))


def measure(q: int, n: int, name: str, read: Read, part: Segment, repeats: int) -> dict[str, Any]:
    nbytes = sum(tensor.nbytes for tensor in tensors(part))
    layers = [part] + [copied(part) for _ in range(-(-TURN_NBYTES // nbytes))]
    queries = torch.randn(q, HEADS, DIM, device="cuda", dtype=torch.bfloat16)

    def turn() -> None:
        for layer in layers:
            read(queries, layer, DIM**-0.5)

    seconds = [each / len(layers) for each in turns(turn, repeats)]
    return {
        "kernel": name,
        "rows": q,
        "prefix": n,
        "nbytes": nbytes,
        "seconds": {"median": median(seconds), "min": min(seconds), "max": max(seconds)},
        "bytes_per_second": nbytes / median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if (why := triton.missing()) is not None:
        raise SystemExit(f"This measures kernels on a GPU, and can't here: {why}.")
    if any(n <= 0 or n % BLOCK for n in given.prefix):
        raise SystemExit(f"--prefix takes whole blocks: multiples of {BLOCK}.")

    copy = copy_rate(given.repeats)
    print(f"copy {copy / 1e9:.0f} GB/s")
    results = []
    for n in given.prefix:
        for q in given.rows:
            for name, read, part in kernels("cuda", q, n):
                result = measure(q, n, name, read, part, given.repeats)
                result["fraction_of_copy"] = result["bytes_per_second"] / copy
                results.append(result)
                print(
                    f"{n:7} columns {q:3} rows  {name:20} {result['seconds']['median'] * 1e6:9.1f} us"
                    f"  {result['bytes_per_second'] / 1e9:6.0f} GB/s  {result['fraction_of_copy']:.2f} of a copy"
                )
    major, minor = torch.cuda.get_device_capability()
    report = {
        "what": "attention over a prefix: bytes of keys and values read a second, and their fraction of a device copy",
        "heads": {"queries": HEADS, "keys": KEY_HEADS, "channels": DIM},
        "copy_bytes_per_second": copy,
        "results": results,
        "hardware": {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton")},
    }
    if given.output:
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
