"""Tuned settings of a model on this machine, as `longspec tune` found them: the fastest dtype and thread count, and the
limits of `--control entropy`.

Takes a config and a device; gives the stored settings, which `auto` then resolves to. Stored as one small JSON file
per model and device in the user's config directory. An invalid file is ignored: the settings affect speed alone, and
tuning again replaces it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspec.errors import LongspecError, UsageError
from longspec.machine.files import read_json, replaced
from longspec.machine.system import config_folder, cores

__all__ = ["Fit", "fit_path", "keep_fit", "read_fit"]

_KIND, _VERSION = "longspec fit", 1
_MOST_NBYTES = 1 << 16
_MOST_NATS, _MOST_TOKENS, _MOST_BANDS = 100.0, 64, 16


@dataclass(frozen=True, slots=True)
class Fit:
    """The settings that `auto` resolves to."""

    dtype: str
    threads: int
    entropy: Sequence[tuple[float, int]] | None = None  # nats with drafted tokens; None where they weren't fitted


def fit_path(config: object, device: str, *, coded: bool) -> Path:
    """The path of a model's tuned settings. coded: its checkpoint holds quantized weights."""
    what = json.dumps([platform.node(), platform.machine(), cores(), repr(config), device, coded])
    return config_folder() / "fit" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"


def read_fit(path: Path) -> Fit | None:
    """The stored settings; None where there are none or they are invalid."""
    try:
        found = read_json(path, _MOST_NBYTES, "The fit")
    except UsageError:
        return None
    if (found.get("kind"), found.get("version")) != (_KIND, _VERSION):
        return None
    dtype, threads = found.get("dtype"), found.get("threads")
    if (
        dtype not in ("fp32", "bf16", "int8", "int4")
        or type(threads) is not int
        or not 1 <= threads <= (os.cpu_count() or 1)
    ):
        return None
    return Fit(dtype, threads, _limits(found.get("entropy")))


def _limits(stored: object) -> tuple[tuple[float, int], ...] | None:
    """Of `--control entropy`; None where they aren't valid."""
    if not isinstance(stored, list) or not 0 < len(stored) <= _MOST_BANDS:
        return None
    pairs = [pair for pair in stored if isinstance(pair, list) and [type(value) for value in pair] == [float, int]]
    nats, tokens = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    fits = len(pairs) == len(stored) and nats == sorted(nats) and tokens == sorted(tokens, reverse=True)
    if not fits or not (nats[0] >= 0 and nats[-1] <= _MOST_NATS and tokens[-1] >= 0 and tokens[0] <= _MOST_TOKENS):
        return None
    return tuple(zip(nats, tokens, strict=True))


def keep_fit(path: Path, fit: Fit, measured: Mapping[str, Any]) -> None:
    """Store the settings atomically. measured: the measurements behind them.

    Raises:
        LongspecError: it can't be written.
    """
    said = {"kind": _KIND, "version": _VERSION, **asdict(fit), **measured}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced(path, lambda place: place.write_text(json.dumps(said) + "\n", encoding="utf-8"))
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror}.") from error
