"""Whose training a folder's work is: its recipe, which a run with another one may not go on from.

Takes a folder and what the training is of, as JSON; knows no head and no step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspec.errors import LongspecError, UsageError
from longspec.machine.files import read_json, replaced

__all__ = ["claim", "put_json"]


def claim(work: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe into a new folder; hold a used one to it.

    Raises:
        UsageError: the folder has another recipe, or none that can be read.
        LongspecError: it can't be written.
    """
    path, said = work / "recipe.json", json.loads(json.dumps(recipe))  # tuples as they will be read
    try:
        work.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            put_json(path, said)
    except OSError as error:
        raise LongspecError(f"{work} can't be used: {error.strerror}; name another folder.") from error
    begun = read_json(path, 1 << 16, "The recipe", hint="name another folder")
    other = [name for name in said if begun.get(name) != said[name]]
    if other:
        raise UsageError(f"{work.parent} holds another training (its {', '.join(other)} differ); ask for the same, or "
                         "name another folder.")  # fmt: skip


def put_json(path: Path, said: Any) -> None:
    """Write a file of JSON, atomically. Raises OSError."""
    replaced(path, lambda place: place.write_text(json.dumps(said, indent=1) + "\n"))
