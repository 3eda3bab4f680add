"""A batch's metadata, stored beside the output as OUT.meta.json: a batch resumes only with the settings it began
with.

It has only what can change an answer: not the drafter, the number of sequences in a pass, or the threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longspec.errors import LongspecError, UsageError
from longspec.machine.files import replaced

if TYPE_CHECKING:
    from longspec.engine.engine import Engine

__all__ = ["About", "identity", "write_json"]


class Stored(Protocol):
    """An output with its metadata."""

    path: Any  # its name, in an error

    @property
    def is_empty(self) -> bool: ...

    def read_about(self) -> Mapping[str, Any]: ...

    def write_about(self, value: Mapping[str, Any]) -> None: ...


class About:
    """The metadata of an output, and the check against it.

    anyway: resume although something differs.
    """

    def __init__(self, output: Stored, *, anyway: bool) -> None:
        self.output = output
        self.anyway = anyway
        self.mixed = False  # whether the output has lines of other settings
        self.recorded: Mapping[str, Any] | None = None if output.is_empty else self._read()

    def check(self, now: Mapping[str, Any]) -> None:
        """Raise UsageError where the stored metadata differs from `now` in a field that both have."""
        if self.recorded is None:
            return
        for name, value in now.items():
            before = self.recorded.get(name)
            if before == value or (name == "input" and None in (before, value)):
                continue
            if not self.anyway:
                shown = "" if name in ("input", "weights", "tokenizer") else f" ({_shown(before)}, now {_shown(value)})"
                raise UsageError(
                    f"{self.output.path} was begun with another {name.replace('_', ' ')}{shown}; name another output, "
                    "or go on in it with --continue-anyway."
                )
            self.mixed = True

    def write(self, now: Mapping[str, Any]) -> None:
        """Store the metadata, unless it is unchanged."""
        mixed = self.mixed or bool((self.recorded or {}).get("mixed"))
        whole = {**now, "mixed": mixed}
        if whole != self.recorded:
            self.output.write_about(whole)

    def _read(self) -> Mapping[str, Any] | None:
        try:
            return self.output.read_about()
        except UsageError as error:
            lacks = error
        if self.anyway:
            self.mixed = True
            return None
        raise UsageError(
            f"{self.output.path} is there, and its record doesn't say what it was made from; name another output, or "
            "go on in it with --continue-anyway."
        ) from lacks


def identity(engine: Engine) -> dict[str, str]:
    """The model's part of the metadata, under the names that an error uses."""
    fingerprint = engine.model.fingerprint
    return {
        "weights": fingerprint["model"],
        "tokenizer": fingerprint["tokenizer"],
        "dtype": fingerprint["dtype"],
        "strictness": fingerprint["strictness"],
        "cache": engine.cache_name,
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically. LongspecError where it can't be written."""
    try:
        replaced(path, lambda place: place.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror}; make room, or name another output.") from error


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
