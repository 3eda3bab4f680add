"""Looped families: all layers run several times, and the final norm lies between two runs (Ouro, 2510.25741).

Takes a config.json's dict; knows no file and no tensor. A run of the layers is a loop. Every loop leaves keys and
values of its own, so that a layer's loops are layers of the cache. The head, behind the final norm, reads any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspec.errors import ModelError
from longspec.model.config_values import MOST_LAYERS

__all__ = ["LOOPED", "loops_of"]

LOOPED = ("ouro",)
"""Values of `model_type`."""


def loops_of(family: str, raw: Mapping[str, Any]) -> int:
    """How often the layers run: once, but for a looped family.

    Its files hold a gate that may end a token's loops early. Published ones say that it never does: a threshold of 1.
    Others are refused by ModelError, as the text would depend on it.
    """
    if family not in LOOPED:
        return 1
    loops, layers = raw.get("total_ut_steps") or 4, raw["num_hidden_layers"]
    if loops * layers > MOST_LAYERS:
        raise ModelError(
            f"The model's config.json runs {layers:,} layers {loops:,} times; {MOST_LAYERS:,} is the most."
        )
    threshold, exit_at = raw.get("early_exit_threshold"), raw.get("early_exit_step")
    if (threshold is not None and threshold < 1) or (exit_at is not None and exit_at != loops - 1):
        raise ModelError(
            f"The model's config.json ends a token's loops early (early_exit_threshold {threshold}, early_exit_step "
            f"{exit_at}); longspec runs all {loops}: set the threshold to 1.0 and leave the step out."
        )
    return int(loops)
