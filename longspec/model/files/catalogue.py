"""The catalogue of good local models: short names with what is known of each before a byte of it is fetched.

Reads catalogue.toml, in which a model costs lines of data only; gives entries, and the best one that a machine runs.
Knows no network and no file on this machine.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from longspec.errors import ModelError
from longspec.model.config import FAMILIES

__all__ = ["FAST", "Entry", "best", "catalogue"]

FAST = 5.0
"""Tokens per second from which a person reads along without waiting."""

_PROCESS_NBYTES = 500 << 20
"""Interpreter, torch, a tokenizer of 150,000 tokens and a pass's buffers, beside weights and cache."""

_TOKENS = 8192
"""Prompt and answer that `need` holds."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue; the fields are explained in catalogue.toml."""

    name: str
    about: str
    repository: str
    file: str
    licence: str
    nbytes: int
    context: int
    row: int
    family: str
    read: int = 0
    drafter: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def need(self) -> int:
        """Bytes of memory for the weights and a text of 8,192 tokens in bf16."""
        return self.nbytes + self.row * min(_TOKENS, self.context) + _PROCESS_NBYTES

    @property
    def is_readable(self) -> bool:
        """Whether longspec runs its architecture."""
        return self.family in FAMILIES or f"{self.family}_text" in FAMILIES

    def speed(self, rate: float) -> float:
        """Tokens per second of plain decoding at most, where memory is read at `rate` bytes per second."""
        return rate / (self.read or self.nbytes)

    def check(self) -> None:
        """Raise ModelError where longspec can't run it."""
        if not self.is_readable:
            raise ModelError(
                f"{self.name} has the architecture {self.family}, which longspec doesn't read yet; "
                "`longspec models --all` marks those that it does."
            )


@cache
def catalogue() -> Mapping[str, Entry]:
    """All entries by name, from the smallest to the best."""
    text = files("longspec.model.files").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return MappingProxyType({name: Entry(name, **fields) for name, fields in tomllib.loads(text).items()})


def best(memory: int, rate: float, entries: Iterable[Entry] | None = None) -> Entry | None:
    """The last entry that longspec reads, that fits in `memory` bytes and writes FAST tokens per second or more where
    memory is read at `rate` bytes per second; None where there is none.
    """
    found = catalogue().values() if entries is None else entries
    fitting = [one for one in found if one.is_readable and one.need <= memory and one.speed(rate) >= FAST]
    return fitting[-1] if fitting else None
