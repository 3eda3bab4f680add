"""A profile of a step's time by component, with a lower bound: for `longspec run --profile`.

Takes an engine, whose methods are wrapped while a sequence is decoded; gives torch's trace and `Times`. Without a
profile nothing is measured or slowed down, since the wrappers are set from outside.

The lower bound is the bytes that a pass has to read, weights and cache, over this machine's memory bandwidth.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from longspec.cache import BLOCK, CACHES
from longspec.cache import native as cpu
from longspec.engine.engine import Engine
from longspec.engine.session import Session

__all__ = ["Times", "profiled", "table"]


@dataclass(slots=True)
class Times:
    """Seconds by component, over all steps of a sequence. `layers` and `head` are the target's; drafters' passes
    count as drafting.
    """

    steps: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    inside: str = ""  # the current section: a step, its drafting, or neither
    trace: str = ""  # in Chrome's JSON format


def _timer(times: Times, device: torch.device) -> Callable[[str, Callable[..., Any], str], Callable[..., Any]]:
    """A function that wraps a call to count its seconds under a name, within a step or within its drafting."""

    def ranged(name: str, call: Callable[..., Any], within: str) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            outside = times.inside
            if within and outside != within:  # a prefill's or drafter's pass: traced, but not counted in a step
                with record_function(name):
                    return call(*given, **more)
            times.inside = (within and (name if name == "draft" else within)) or "step"
            began = perf_counter()
            try:
                with record_function(name):
                    return call(*given, **more)
            finally:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.seconds[name] += perf_counter() - began
                times.inside = outside

        return timed

    return ranged


@contextmanager
def profiled(engine: Engine) -> Iterator[Times]:
    """Within the block, steps of this engine are measured and traced; at its end the trace is complete."""
    times, decoder = Times(), engine.model.decoder
    device, ranged = decoder.device, _timer(times, decoder.device)

    def steps(*given: Any, **more: Any) -> Any:
        times.steps += 1
        return step(*given, **more)

    def texts(*given: Any) -> Any:
        """A pass's batched attention, with the C kernel called through Python: some 10 us more per layer."""
        made = prepare(*given)
        if made is not None:
            made._kernel = kernel
        return made

    step, prepare, library = ranged("step", engine.step, ""), decoder._texts, cpu.kernel()
    kernel: Any = library if isinstance(library, str) else _Kernel(library, ranged)
    put: list[tuple[Any, str, Callable[..., Any]]] = [
        (engine, "step", steps),
        (decoder, "forward", ranged("layers", decoder.forward, "step")),
        (decoder, "logits", ranged("head", decoder.logits, "step")),
        (decoder, "_texts", texts),
        (decoder, "_attend", ranged("attention", decoder._attend, "step")),
    ]
    for drafter in engine.speculator.drafters.values():
        put.append((drafter, "propose", ranged("draft", drafter.propose, "step")))
    own = [(owner, name, vars(owner).get(name)) for owner, name, _ in put]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    trace = profile(activities=activities)
    with _silent():
        trace.start()
    for owner, name, call in put:
        vars(owner)[name] = call
    try:
        yield times
    finally:
        for owner, name, before in own:
            if before is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = before
        with _silent():
            trace.stop()
    with tempfile.TemporaryDirectory() as folder:
        trace.export_chrome_trace(str(Path(folder, "trace.json")))
        times.trace = Path(folder, "trace.json").read_text(encoding="utf-8")


@contextmanager
def _silent() -> Iterator[None]:
    """Silence stderr within the block: some releases of torch log the profiler's start and end."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Kernel:
    """The attention kernel, called through a traced range even where another C function calls it."""

    def __init__(self, kernel: ctypes.CDLL, ranged: Callable[..., Callable[..., Any]]) -> None:
        self.texts_workspace, self.texts_read = kernel.texts_workspace, ranged("attention", kernel.texts_read, "step")
        timed = ranged("attention", kernel.texts_attend, "step")

        def attend(*given: Any) -> None:
            """By each of the team's threads: the leader's time counts, and planning is without an output."""
            *_, output, _, rank = given
            (timed if output and not rank else kernel.texts_attend)(*given)

        self.texts_attend = ctypes.CFUNCTYPE(None, *kernel.texts_attend.argtypes)(attend)


def table(times: Times, engine: Engine, session: Session, rate: float | None) -> str:
    """The table for the user: a line per component of a step, and the lower bound, where the memory's rate is known, in
    bytes per second. Empty without a step.
    """
    if not times.steps:
        return ""
    mean = {name: seconds / times.steps for name, seconds in times.seconds.items()}
    whole, layers = mean["step"], mean.get("layers", 0.0)
    first, last = session.prompt_length, len(session.tokens)
    rows = [("step", whole), ("  draft", mean.get("draft", 0.0)), ("  layers", layers)]
    if "attention" in mean:
        rows += [("    attention", mean["attention"]), ("    products", layers - mean["attention"])]
    rows += [("  head", mean.get("head", 0.0))]
    rows += [("  rest", whole - sum(mean.get(name, 0.0) for name in ("draft", "layers", "head")))]
    lines = [f"a step's time, means of {times.steps:,} steps behind {first:,} to {last:,} tokens"]
    lines += [f"{name:16} {1e3 * seconds:9.3f} ms {100 * seconds / whole:4.0f} %" for name, seconds in rows]
    if rate is None:
        return "\n".join(lines)
    decoder = engine.model.decoder
    empty = CACHES[session.cache_name](replace(decoder.shape, device=torch.device("meta")))
    middle = (first + last) / 2
    blocks = ceil(middle / BLOCK) * BLOCK  # cache bytes are given in whole blocks
    weights, rows_nbytes = decoder.pass_nbytes, empty.room(blocks).device * middle / blocks
    floor = (weights + rows_nbytes) / rate
    lines.append(
        f"{'floor':16} {1e3 * floor:9.3f} ms {100 * floor / whole:4.0f} %  {weights / 1e6:,.1f} MB of weights and "
        f"{rows_nbytes / 1e6:,.1f} MB of cache at {rate / 1e9:.1f} GB/s"
    )
    return "\n".join(lines)
