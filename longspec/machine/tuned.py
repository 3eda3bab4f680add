"""Tuned settings of a model on this machine, as `longspec tune` found them: the fastest dtype and thread count, and the
bound of `--control entropy`.

Takes a config and a device; gives the stored settings, which `auto` then resolves to. Stored as one small JSON file
per model and device in the user's config directory. An invalid file is ignored: the settings affect speed alone, and
tuning again replaces it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspec.errors import LongspecError, UsageError
from longspec.machine.files import read_json, replaced
from longspec.machine.system import config_folder, cores

__all__ = ["Fit", "fit_path", "keep_fit", "read_fit"]

_KIND, _VERSION = "longspec fit", 1
_MOST_NBYTES = 1 << 16
_MOST_ENTROPY = 100.0  # nats: more than any vocabulary has


@dataclass(frozen=True, slots=True)
class Fit:
    """The settings that `auto` resolves to."""

    dtype: str
    threads: int
    entropy: float | None = None  # in nats; None where it wasn't fitted


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
    entropy = found.get("entropy")
    if not isinstance(entropy, int | float) or not 0 <= entropy < _MOST_ENTROPY:
        return Fit(dtype, threads)
    return Fit(dtype, threads, float(entropy))


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
