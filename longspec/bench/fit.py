"""Benchmark of dtypes and thread counts for a model on this machine: latencies of passes, and perplexities.

Takes an opened checkpoint; gives every setting measured, and the fastest one of acceptable perplexity. Thread counts
are tried first, interleaved, with the default dtype; then each dtype with the best thread count. A dtype whose
perplexity on a fixed text is more than 1 % above the least isn't chosen, however fast it is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from longspec.bench.tune import CHECKS, NOTES, PROMPTS, rate
from longspec.engine.engine import Engine, costs_path
from longspec.engine.forward import Input, logits_of
from longspec.engine.session import Session
from longspec.errors import UsageError
from longspec.machine.system import cores
from longspec.machine.tuned import Fit
from longspec.model.load import Model, Opened, choose_dtype, native_dtype
from longspec.text.detokenizer import decode
from longspec.types import Draft

__all__ = ["ROWS", "Measured", "best", "bets", "candidates", "measure", "threads_of"]

ROWS = (1, 9, 64)
"""Of a pass: plain decoding, a verified draft, a piece of a prompt."""

_SWEEPS = 9  # passes per setting, of which the median counts
_TOKENS = 320  # of the text: those of the largest pass come last
_WRITTEN = 11  # maximum number of prompts answered by both
_WORSE = 1.01  # the greatest perplexity allowed, relative to the least


@dataclass(frozen=True, slots=True)
class Measured:
    """One setting: seconds of a pass for each of ROWS, and the perplexity of its dtype."""

    fit: Fit
    seconds: tuple[float, ...]
    perplexity: float = float("nan")

    @property
    def score(self) -> float:
        """Seconds of a plain pass plus a verification pass."""
        return self.seconds[0] + self.seconds[1]


def candidates(opened: Opened) -> list[str]:
    """The dtypes with fast kernels on the device, the default one first."""
    if opened.device.type != "cpu":
        return [opened.dtype]
    found = [opened.dtype, native_dtype(opened.device)]
    with suppress(UsageError):  # there is no kernel for it
        found.append(choose_dtype("int8", opened.device, opened.checkpoint, opened.config))
    return list(dict.fromkeys(found))


def threads_of(device: torch.device) -> list[int]:
    """The number of processors, its half, quarter and eighth."""
    if device.type != "cpu":
        return [torch.get_num_threads()]
    return list(dict.fromkeys(max(1, cores() >> halves) for halves in range(4)))


def measure(
    opened: Opened, dtypes: Sequence[str], threads: Sequence[int], report: Callable[[str, int, int], None]
) -> tuple[list[Measured], Model]:
    """All settings' measurements, and the model in the best one, to which torch's thread count is set."""
    found: list[Measured] = []
    model, count = None, threads[0]
    for done, dtype in enumerate(dtypes):
        report("measuring dtypes and threads", done, len(dtypes))
        del model
        gc.collect()  # two models at once may not fit
        model = replace(opened, dtype=dtype).load()
        timed = _timed(model, threads if done == 0 else [count])
        count = min(timed, key=lambda one: sum(timed[one][:2]))
        value = _perplexity(model)
        found += [Measured(Fit(dtype, each), seconds, value) for each, seconds in timed.items()]
    chosen = best(found).fit
    torch.set_num_threads(chosen.threads)
    if model is None or model.dtype != chosen.dtype:
        del model
        gc.collect()
        model = replace(opened, dtype=chosen.dtype).load()
    return found, model


def best(found: Sequence[Measured]) -> Measured:
    """The fastest setting of those with acceptable perplexity."""
    least = min(one.perplexity for one in found)
    # A broken model's perplexity is NaN, so compare with `not >`.
    return min((one for one in found if not one.perplexity > _WORSE * least), key=lambda one: one.score)


def bets(model: Model, context: int, until: float, report: Callable[[str, int, int], None]) -> float:
    """The speed-up of `--drafter auto` over plain decoding: the median over prompts answered in turn, each of
    CHECKS once, more until `until`. The latencies learned are stored for later processes.
    """
    plain = Engine(model, drafter="none", cache="dense")
    auto = Engine(model, drafter="auto", cache="dense", costs_file=costs_path(model))
    ratios: list[float] = []
    while len(ratios) < len(CHECKS) or (perf_counter() < until and len(ratios) < _WRITTEN):
        report("measuring drafters", len(ratios), _WRITTEN)
        prompt = [*CHECKS, *PROMPTS][len(ratios) % (len(CHECKS) + len(PROMPTS))]
        first, second = (plain, auto) if len(ratios) % 2 else (auto, plain)
        rates = {engine: rate(engine, prompt, context) for engine in (first, second)}
        ratios.append(rates[auto] / rates[plain])
    auto.keep_costs()
    return median(ratios)


@torch.inference_mode()
def _timed(model: Model, threads: Sequence[int]) -> dict[int, tuple[float, ...]]:
    """Seconds of passes for each of ROWS, for each thread count, measured in turn."""
    session = _session(model)
    engine = Engine(model, drafter="none", cache="dense")
    while session.cache.length < len(session.tokens) - ROWS[-1] - 1:
        engine.read(session, len(session.tokens) - ROWS[-1] - 1)
    took: dict[tuple[int, int], list[float]] = {(count, rows): [] for count in threads for rows in ROWS}
    for sweep in range(_SWEEPS + 1):
        for count in threads:
            torch.set_num_threads(count)
            for rows in ROWS:
                _pass(session, model, rows)  # wakes its threads
                began = perf_counter()
                _pass(session, model, rows)
                if sweep:
                    took[count, rows].append(perf_counter() - began)
    return {count: tuple(median(took[count, rows]) for rows in ROWS) for count in threads}


def _pass(session: Session, model: Model, rows: int) -> Tensor:
    """Logits [rows, V] of the next tokens; nothing is committed."""
    first, *others = session.unfed[:rows]
    return logits_of([Input.of(session, [first], Draft.chain(others))], model.decoder)


@torch.inference_mode()
def _perplexity(model: Model) -> float:
    """The perplexity of a fixed text's tokens but the first."""
    session = _session(model)
    logits = _pass(session, model, len(session.tokens) - 1)
    wanted = torch.tensor(session.tokens[1:], device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits.float(), wanted).exp())


def _session(model: Model) -> Session:
    """A session with no token cached yet, of the greatest length that the context allows."""
    text, engine = NOTES + "\n\n".join([*PROMPTS, *CHECKS]), Engine(model, drafter="none", cache="dense")
    tokens = model.vocabulary.encode(text, add_special=False)[: min(_TOKENS, engine.context - 1)]
    return engine.open(decode(model.vocabulary, tokens), raw=True, max_new_tokens=1, temperature=0)
