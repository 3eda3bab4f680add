"""Changes of the logits before a token is chosen: a bias, penalties by how often a token was written, a caller's own.

Takes logits of r rows and the text before each; gives logits. What a processor gives a row may depend on that row's
own logits and text alone: then a draft's rows get what plain decoding would have given them, and speculation stays
exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from longspec.errors import UsageError
from longspec.machine.schema import shown

__all__ = ["MOST_BIAS", "Processor", "biased", "changed", "checked_bias", "penalised"]

Processor = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]
"""From logits [r, V] and, for each row, the answer's tokens before it, to logits [r, V]. It mustn't change its
arguments."""

MOST_BIAS = 100.0
"""Bound of a bias, as in OpenAI's API."""


_WANTED = (
    "numbers of the shape [r, V] of the logits that it takes, in each row one at least that is finite, no NaN, no inf"
)


def changed(
    process: Processor, logits: Tensor, answers: Sequence[Sequence[int]]
) -> tuple[Tensor, Mapping[int, Exception]]:
    """The processor's logits, and by row the error of those that it gives nothing to choose from, its own exception
    among them. They are zeros then: a row of a draft that is never reached must not end the text.
    """
    try:
        return _checked(process, process(logits, answers), logits)
    except Exception as error:  # noqa: BLE001  a caller's code may raise anything
        if len(logits) == 1:
            return torch.zeros_like(logits), {0: error}
    alone = [changed(process, logits[row : row + 1], answers[row : row + 1]) for row in range(len(logits))]
    faults = {row: wrong[0] for row, (_, wrong) in enumerate(alone) if wrong}
    return torch.cat([found for found, _ in alone]), faults


def _checked(process: Processor, found: object, logits: Tensor) -> tuple[Tensor, Mapping[int, Exception]]:
    """What a processor returned, as `changed` gives it. Raises UsageError where it is no logits of these rows."""
    name = getattr(process, "__name__", type(process).__name__)
    if not isinstance(found, Tensor) or found.shape != logits.shape or not found.is_floating_point():
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else shown(found)
        raise UsageError(f"The processor {name} returned {what} for logits {list(logits.shape)}; it must be {_WANTED}.")
    best = found.amax(-1)  # NaN where one is NaN
    if not len(wrong := (~best.isfinite()).nonzero()[:, 0].tolist()):
        return found, {}
    words = {row: "-inf only" if value == -torch.inf else str(value) for row, value in enumerate(best.tolist())}
    return found.masked_fill(~best.isfinite()[:, None], 0), {
        row: UsageError(f"The processor {name} returned {words[row]} in a row; it must be {_WANTED}.") for row in wrong
    }


def checked_bias(bias: Mapping[int, float], vocabulary: int) -> dict[int, float]:
    """The bias by token id. Raises UsageError where a token or a value is out of range."""
    for token, value in bias.items():
        if type(token) is not int or not 0 <= token < vocabulary:
            raise UsageError(f"logit_bias names the token {token!r}; the model's tokens are 0 to {vocabulary - 1}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST_BIAS:
            raise UsageError(f"logit_bias gives token {token} {value!r}; it must be a number from -100 to 100.")
    return {token: float(value) for token, value in bias.items()}


def biased(bias: Mapping[int, float]) -> Processor:
    """Adds to the logits of some tokens."""

    def process(logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        tokens = torch.tensor([*bias], device=logits.device)
        values = torch.tensor([*bias.values()], dtype=torch.float32, device=logits.device)
        logits = logits.float().clone()
        logits[:, tokens] += values
        return logits

    return process


def penalised(logits: Tensor, counts: Sequence[Counter[int]], frequency: float, presence: float) -> Tensor:
    """OpenAI's penalties, in fp32: a token that the row's answer has c > 0 times loses c * frequency + presence."""
    logits = logits.float().clone()
    for row, written in zip(logits, counts, strict=True):
        tokens = torch.tensor([*written], dtype=torch.int64, device=row.device)
        times = torch.tensor([*written.values()], dtype=torch.float32, device=row.device)
        row[tokens] -= frequency * times + presence
    return logits
