"""The limits of `--control entropy`, fitted to a model: how many tokens are worth drafting behind how sure a target.

Takes a loaded model; gives limits. The model writes texts with always as many drafted tokens as may be. Their steps say
what shorter drafts would have kept, in bands of the entropy before them. All or nothing, as in Cerberus (2410.13344,
whose gate is set by hand), loses nearly as large a share of tokens as it saves of rows: behind unsure tokens too the
first nodes are kept (docs/benchmarks/gate.json). Other texts, written with and without the limits, say what they do. No
time is measured, so that a model has the same limits on every machine.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from longspec.bench.tune import CHECKS, PROMPTS, rate
from longspec.control.policy import Entropy, Limits, Step
from longspec.drafters.auto import auto, heads_for
from longspec.engine.engine import Engine
from longspec.model.load import Model

__all__ = ["EVERYTHING", "Gate", "Seen", "Watched", "calibrate", "fitted"]

EVERYTHING: Limits = ((Entropy.MOST, 64),)

_LOST = 0.02
"""Of the tokens per step, on the texts that limits are fitted to. On texts of other kinds more is lost: .07 on
Spec-Bench (docs/benchmarks/gate.json).
"""

_BANDS = 4
_PRICES = [0.0005 * 1.15**i for i in range(50)]
"""Of a drafted token, in kept ones."""


class Seen(NamedTuple):
    """One step of one text."""

    entropy: float  # of the distribution before it, in nats
    drafted: int
    kept: Sequence[int]  # nodes of the draft


@dataclass(frozen=True, slots=True)
class Gate:
    """Limits with what they do to texts that they weren't fitted to, as shares of what is without them."""

    limits: Limits
    saved: float  # of the drafted tokens
    lost: float  # of the tokens per step


class Watched(Entropy):
    """The control, with a record of its steps; a text's first one, before which no entropy is known, isn't in it."""

    def __init__(self, drafter: str, limits: Limits = EVERYTHING) -> None:
        super().__init__(drafter, limits)
        self.seen: list[Seen] = []

    def observe(self, step: Step) -> None:
        for outcome in step.outcomes:
            if (entropy := self.entropy_of(outcome.session)) is not None:
                self.seen.append(Seen(entropy, len(outcome.draft), outcome.kept))
        super().observe(step)


def calibrate(model: Model, until: float, report: Callable[[str, int, int], None]) -> Gate:
    """Fit the limits to the first drafter of `auto`. until: when no further text is begun, on perf_counter's clock; one
    is written at least.
    """
    (name, *_) = (spec.name for spec in auto({}, nbytes=model.decoder.nbytes, heads=heads_for(model)))

    def steps(prompts: Sequence[str], limits: Limits = EVERYTHING) -> list[Seen]:
        control = Watched(name, limits)
        engine = Engine(model, drafter=name, cache="dense", control=control)
        for done, prompt in enumerate(prompts):
            report("fitting the limits of entropy", done, len(prompts))
            if done and perf_counter() >= until:
                break
            rate(engine, prompt, None)  # behind a long text an unsure model still copies
        return control.seen

    found = fitted(steps(PROMPTS))
    free = steps(CHECKS)
    return Gate(found, *_effect(free, steps(CHECKS, found)))


def fitted(seen: Sequence[Seen], lost: float = _LOST) -> Limits:
    """Limits that lose at most this share of the tokens per step, for bands of as many steps each.

    At a price for a drafted token each band has the length that brings the most beyond it, and none a longer one than
    the band of less entropy. The dearest price that loses no more is taken.
    """
    if not any(step.kept for step in seen):
        return Entropy.LIMITS
    ordered, longest = sorted(seen, key=lambda step: step.entropy), max(step.drafted for step in seen)
    bands = [ordered[i * len(seen) // _BANDS : (i + 1) * len(seen) // _BANDS] for i in range(_BANDS)]
    bands = [band for band in bands if band]
    brought = [[sum(bisect_left(step.kept, n) for step in band) for n in range(longest + 1)] for band in bands]
    drafted = [[sum(min(step.drafted, n) for step in band) for n in range(longest + 1)] for band in bands]
    whole = len(seen) + sum(len(step.kept) for step in seen)
    lengths = [longest] * len(bands)
    for price in _PRICES:
        found, most = list[int](), longest
        for kept, rows in zip(brought, drafted, strict=True):
            most = max(range(most + 1), key=lambda n: kept[n] - price * rows[n])
            found.append(most)
        if len(seen) + sum(kept[n] for kept, n in zip(brought, found, strict=True)) >= (1 - lost) * whole:
            lengths = found
    nats = [math.ceil(band[-1].entropy * 1e4) / 1e4 for band in bands[:-1]]
    return tuple(zip([*nats, Entropy.MOST], lengths, strict=True))


def _effect(free: Sequence[Seen], gated: Sequence[Seen]) -> tuple[float, float]:
    """Shares of the drafted tokens that are saved, and of the tokens per step that are lost."""

    def drafted(seen: Sequence[Seen]) -> float:
        return sum(step.drafted for step in seen) / max(1, sum(1 + len(step.kept) for step in seen))

    def brought(seen: Sequence[Seen]) -> float:
        return sum(1 + len(step.kept) for step in seen) / max(1, len(seen))

    saved = 1 - drafted(gated) / drafted(free) if drafted(free) else 0.0
    return saved, 1 - brought(gated) / brought(free) if free else 0.0
