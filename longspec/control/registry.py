"""The controls, by the names that the command and the engine take."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longspec.control.goodput import Goodput
from longspec.control.latency import costs_file
from longspec.control.policy import Confident, Control, Fixed, Sure
from longspec.errors import UsageError
from longspec.model.load import Model

__all__ = ["CONTROLS", "make", "place"]

CONTROLS = ("goodput", "fixed", "confidence", "entropy")
"""How much to bet: what brings most tokens per second; always all; likely paths; not after a hard token."""


def make(name: str, drafters: Sequence[str], most: int, learned: Mapping[str, Any] | None = None) -> Control:
    """learned: what an earlier run's goodput control reported. Raises UsageError: no control has this name."""
    if name not in CONTROLS:
        raise UsageError(f"The control {name!r} is not known; use one of: {', '.join(CONTROLS)}.")
    if name == "goodput" and tuple(drafters) != ("none",):
        return Goodput(drafters, most, learned)
    return {"confidence": Confident, "entropy": Sure}.get(name, Fixed)(drafters[0])


def place(model: Model) -> Path:
    """Where it is kept what this model's steps cost on this machine, and what bets on its texts brought."""
    decoder = model.decoder
    return costs_file(
        machine=f"{platform.node()} {platform.machine()}",
        config=repr(decoder.config),
        dtype=model.dtype,
        device=str(decoder.device),
        strict=str(decoder.strict),
        threads=str(torch.get_num_threads()),
    )
