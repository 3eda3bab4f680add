"""The sampling parameters of a sequence: each declared once, with its type and bounds.

The command, templates, requests and saved conversations take names, types and bounds from `PARAMETERS`. Imports no
torch, so that a wrong value is refused before anything heavy is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, TypedDict

from longspec.errors import UsageError
from longspec.machine.schema import shown

__all__ = [
    "LEAST_TEMPERATURE",
    "MOST_LOGPROBS",
    "MOST_TEMPERATURE",
    "NUMBERS",
    "PARAMETERS",
    "SAMPLED_ONLY",
    "Bounds",
    "Sampling",
    "SamplingOptions",
    "without_idle",
]

MOST_TEMPERATURE = 2.0
"""Upper bound of the temperature, as in OpenAI's API: a higher one is more likely a typo (7 for 0.7)."""


MOST_LOGPROBS = 20
"""Bound of the likeliest tokens that are told, as in OpenAI's API."""


LEAST_TEMPERATURE = 1e-3
"""Below it decoding is greedy: the noise would decide between exact ties only, and logits divided by 1e-38 overflow."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Type and range of a parameter: an interval, closed unless an end is marked open."""

    kind: type[int] | type[float]
    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def hold(self, value: float) -> bool:
        """True if it is a number of this kind, finite, and within the bounds."""
        if not self._is_kind(value):
            return False
        above = value > self.least if self.open_below else value >= self.least
        below = value < self.most if self.open_above else value <= self.most
        return above and below and value not in (math.inf, -math.inf)

    def check(self, name: str, value: Any) -> None:
        """Raise UsageError where the value isn't such a number."""
        if not self.hold(value):
            wanted = self.words if self._is_kind(value) and self.words else self.number
            raise UsageError(f"{name} is {shown(value)}; it must be {wanted}.")

    def _is_kind(self, value: object) -> bool:
        """Whether it is a number of this kind: a whole one is a number too, and 4.0 isn't whole."""
        return isinstance(value, Integral if self.kind is int else Real) and not isinstance(value, bool)

    @property
    def words(self) -> str:
        """The bounds as the end of a sentence: "0 or more and at most 2"; empty if there are none."""
        if self.least == -math.inf:
            return ""
        low = f"above {self.least:g}" if self.open_below else f"{self.least:g} or more"
        if self.most == math.inf:
            return low
        if self.kind is int:
            return f"{self.least:g} to {self.most:g}"
        return f"{low} and {'below' if self.open_above else 'at most'} {self.most:g}"

    @property
    def number(self) -> str:
        """Type and bounds in words: "a number, 0 or more and at most 2"."""
        kind = "a whole number" if self.kind is int else "a number"
        return f"{kind}{' ' if self.open_below else ', ' * bool(self.words)}{self.words}"


def _parameter(default: float, *, sampled_only: bool = False, **bounds: Any) -> Any:
    """A field with its bounds. sampled_only: without effect at temperature 0."""
    return field(default=default, metadata={"bounds": Bounds(type(default), **bounds), "sampled_only": sampled_only})


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters, applied in the order of transformers, as here.

    frequency_penalty, times how often the answer has a token, and presence_penalty, where it has it, are subtracted
    from its logit (OpenAI's definitions); repetition_penalty divides (positive) or multiplies (negative) the logits of
    tokens that the sequence holds; temperature divides logits, and below LEAST_TEMPERATURE is greedy; top_k keeps that
    many tokens (0: all); top_p keeps the smallest set with this much probability; min_p keeps tokens with at least this
    fraction of the best one's probability.
    """

    temperature: float = _parameter(0.0, least=0, most=MOST_TEMPERATURE)
    top_k: int = _parameter(0, least=0, sampled_only=True)
    top_p: float = _parameter(1.0, least=0, most=1, open_below=True, sampled_only=True)
    min_p: float = _parameter(0.0, least=0, most=1, open_above=True, sampled_only=True)
    repetition_penalty: float = _parameter(1.0, least=0, open_below=True)
    seed: int = _parameter(0)
    frequency_penalty: float = _parameter(0.0, least=-2, most=2)
    presence_penalty: float = _parameter(0.0, least=-2, most=2)

    def __post_init__(self) -> None:
        for name, bounds in PARAMETERS.items():
            bounds.check(name, getattr(self, name))

    @classmethod
    def over(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Sampling:
        """Merge options: the user's (`given`) before the checkpoint's generation config (`defaults`) before greedy.

        Raises:
            UsageError: a value is out of range, or has no effect since decoding is greedy.
        """
        sampled = defaults.get("do_sample", False)
        penalties = {"repetition_penalty", "frequency_penalty", "presence_penalty"}
        named = PARAMETERS.keys() - {"seed"} if sampled else penalties
        base = {name: defaults[name] for name in named if defaults.get(name) is not None}
        if sampled:
            base.setdefault("temperature", 1.0)
        sampling = cls(**{**base, **given})
        if sampling.is_greedy and (idle := sorted(given.keys() & SAMPLED_ONLY)):
            raise UsageError(f"{idle[0]} has no effect without sampling; give a temperature above 0 too.")
        return sampling

    @property
    def is_greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0

    @property
    def counts(self) -> bool:
        """Whether a token's logit depends on how often the answer has it."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def without_seed(self) -> tuple[float, ...]:
        """All values but the seed: sequences with equal ones can be sampled by one call."""
        return tuple(getattr(self, name) for name in PARAMETERS if name != "seed")


class SamplingOptions(TypedDict, total=False):
    """The parameters as options of one sequence; None is the checkpoint's default. A test checks for completeness."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    frequency_penalty: float | None
    presence_penalty: float | None


PARAMETERS: Mapping[str, Bounds] = {each.name: each.metadata["bounds"] for each in fields(Sampling)}
NUMBERS: Mapping[str, Bounds] = {
    **PARAMETERS,
    "max_new_tokens": Bounds(int, least=1),
    "reasoning_budget": Bounds(int, least=0),
    "logprobs": Bounds(int, least=0, most=MOST_LOGPROBS),
}
"""Every option of a text that is a number."""

SAMPLED_ONLY = frozenset(each.name for each in fields(Sampling) if each.metadata["sampled_only"])
"""Parameters that have no effect in greedy decoding."""


def is_greedy(temperature: float | None) -> bool:
    """Whether this temperature is given and leaves nothing to the noise."""
    return temperature is not None and 0 <= temperature < LEAST_TEMPERATURE


def without_idle(options: Mapping[str, Any], keep: Container[str] = ()) -> dict[str, Any]:
    """The options without those that have no effect if the temperature is greedy; those in `keep` stay."""
    idle = SAMPLED_ONLY if is_greedy(options.get("temperature")) else frozenset()
    return {name: value for name, value in options.items() if name not in idle or name in keep}
