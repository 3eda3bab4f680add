"""The bound of `--control entropy`, fitted to a model: behind which distributions drafting isn't worth its positions.

Takes a loaded model; gives a bound in nats. The model writes texts with always as many drafted tokens as may be; the
lowest bound is taken at which these steps would have kept all but a twentieth of their tokens (Cerberus, 2410.13344,
sets its gate by hand). Other texts, written with and without it, say what that does. No time is measured, so that a
model has the same bound on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from longspec.bench.tune import CHECKS, PROMPTS, rate
from longspec.control.policy import Entropy, Step
from longspec.drafters.auto import auto, heads_for
from longspec.engine.engine import Engine
from longspec.model.load import Model

__all__ = ["Gate", "Seen", "Watched", "bound", "calibrate"]

_LOST = 0.05  # of the tokens per step


class Seen(NamedTuple):
    """One step of one text."""

    entropy: float  # of the distribution before it, in nats
    drafted: int
    kept: int


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound with what it does to texts that it wasn't fitted to, as shares of what is without it."""

    entropy: float
    saved: float  # of the drafted tokens
    lost: float  # of the tokens per step


class Watched(Entropy):
    """The control, with a record of its steps; a text's first one, before which no entropy is known, isn't in it."""

    def __init__(self, drafter: str, most: float = math.inf) -> None:
        super().__init__(drafter, most)
        self.seen: list[Seen] = []

    def observe(self, step: Step) -> None:
        for outcome in step.outcomes:
            if (entropy := self.entropy_of(outcome.session)) is not None:
                self.seen.append(Seen(entropy, len(outcome.draft), len(outcome.kept)))
        super().observe(step)


def calibrate(model: Model, until: float, report: Callable[[str, int, int], None]) -> Gate:
    """Fit the bound to the first drafter of `auto`. until: when no further text is begun, on perf_counter's clock; one
    is written at least.
    """
    (name, *_) = (spec.name for spec in auto({}, nbytes=model.decoder.nbytes, heads=heads_for(model)))

    def steps(prompts: Sequence[str], most: float = math.inf) -> list[Seen]:
        control = Watched(name, most)
        engine = Engine(model, drafter=name, cache="dense", control=control)
        for done, prompt in enumerate(prompts):
            report("fitting the entropy bound", done, len(prompts))
            if done and perf_counter() >= until:
                break
            rate(engine, prompt, None)  # behind a long text an unsure model still copies
        return control.seen

    found = bound(steps(PROMPTS))
    free = steps(CHECKS)
    return Gate(found, *_effect(free, steps(CHECKS, found)))


def bound(seen: Sequence[Seen], lost: float = _LOST) -> float:
    """The lowest bound that loses at most this share of the tokens per step.

    A step that isn't drafted for brings one token, and those that it would have kept are written by later steps: of n
    steps and their t tokens, with k of them kept behind bounded entropies, (t - k) / n a step remain.
    """
    if not any(step.kept for step in seen):
        return Entropy.MOST
    tokens = len(seen) + sum(step.kept for step in seen)
    kept, least = 0, 0.0
    for step in sorted(seen, reverse=True):
        kept += step.kept
        if kept > lost * tokens:
            least = step.entropy
            break
    return math.ceil(least * 1e4) / 1e4


def _effect(free: Sequence[Seen], gated: Sequence[Seen]) -> tuple[float, float]:
    """Shares of the drafted tokens that are saved, and of the tokens per step that are lost."""

    def drafted(seen: Sequence[Seen]) -> float:
        return sum(step.drafted for step in seen) / max(1, sum(1 + step.kept for step in seen))

    def brought(seen: Sequence[Seen]) -> float:
        return sum(1 + step.kept for step in seen) / max(1, len(seen))

    saved = 1 - drafted(gated) / drafted(free) if drafted(free) else 0.0
    return saved, 1 - brought(gated) / brought(free) if free else 0.0
