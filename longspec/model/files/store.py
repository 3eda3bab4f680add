"""The user's folder of pulled models, with atomic creation of its subfolders.

Knows paths, locks and disk space, and no model. A folder is made under a temporary name and renamed when it is
complete, by one process at a time: an existing folder is complete, and a killed process's remains are removed by the
next one.

    ~/.cache/longspec/models/NAME/              config.json, tokenizer.json, ..., source.gguf
    ~/.cache/longspec/models/NAME/{fp32,bf16}/  the same files and model.safetensors, made on first use
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from longspec.errors import ModelError
from longspec.machine.system import cache_folder

__all__ = ["SOURCE", "Report", "models_folder", "need_room", "quiet", "workspace"]

SOURCE = "source.gguf"
"""What a pulled model's weights are made of."""

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0 where that isn't known)."""


def quiet(stage: str, done: int, total: int) -> None:
    """A report callback that does nothing."""


def models_folder() -> Path:
    """The models' folder in the user's cache directory."""
    return cache_folder() / "models"


@contextmanager
def workspace(folder: Path, report: Report) -> Iterator[Path]:
    """A temporary folder beside `folder`, locked for one process; removed afterwards, with any left by killed
    processes.

    Raises ModelError where the disk is full or not writable.
    """
    import fcntl

    beside, name = folder.parent, folder.name
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with (beside / f".{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report("waiting for another longspec", 0, 0)
                fcntl.flock(lock, fcntl.LOCK_EX)
            for stale in beside.glob(f".{name}-*"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=beside) as temporary:
                yield Path(temporary)
    except OSError as error:
        raise ModelError(f"{name} can't be stored in {beside}: {error.strerror or error}.") from error


def need_room(folder: Path, nbytes: int) -> None:
    """Raise ModelError where the disk of `folder` has less than `nbytes` free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ModelError(f"{folder} needs {nbytes / 1e6:,.0f} MB of disk and has {free / 1e6:,.0f} MB left.")
