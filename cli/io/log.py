"""The log of prompts and answers that `--log` keeps: an SQLite file in the user's state folder, for the user alone.

Takes and gives plain values; nothing is kept unless it is asked for.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longspec.errors import LongspecError
from longspec.machine.system import state_folder

__all__ = ["Entry", "conversation", "entries", "keep", "path"]

_COLUMNS = "conversation, at, model, system, prompt, answer, reasoning, finish_reason, tokens, seconds"
_TABLE = """CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, conversation INTEGER NOT NULL, at TEXT NOT NULL, model TEXT NOT NULL, system TEXT,
    prompt TEXT NOT NULL, answer TEXT NOT NULL, reasoning TEXT, finish_reason TEXT NOT NULL, tokens INTEGER NOT NULL,
    seconds REAL NOT NULL)"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer. conversation: the id of the first answer of its conversation; seconds: of writing it."""

    conversation: int
    at: str  # ISO 8601, UTC
    model: str
    system: str | None
    prompt: str
    answer: str
    reasoning: str | None
    finish_reason: str
    tokens: int
    seconds: float


def path() -> Path:
    """The log's file."""
    return state_folder() / "log.db"


def keep(system: str | None, prompt: str, answer: Any, *, conversation: int | None = None) -> None:
    """Add an answer (or a server's report of one); conversation: the one that it goes on with.

    Raises:
        LongspecError: the log can't be written.
    """
    at = datetime.now(UTC).isoformat(timespec="seconds")
    usage, seconds = answer.usage["completion_tokens"], float(answer.timing.get("decode_s") or 0.0)
    said = (answer.text, answer.reasoning, answer.finish_reason, usage, seconds)
    with _opened() as log:
        marks = ", ".join("?" * 10)
        values = (conversation or 0, at, answer.model, system, prompt, *said)
        made = log.execute(f"INSERT INTO answers ({_COLUMNS}) VALUES ({marks})", values)  # noqa: S608  constants
        if conversation is None:
            log.execute("UPDATE answers SET conversation = id WHERE id = ?", (made.lastrowid,))


def entries(most: int, search: str | None = None) -> list[Entry]:
    """The last answers, the oldest of them first; search: words that prompt or answer must have."""
    if not path().exists():
        return []
    found = "WHERE prompt LIKE ? ESCAPE '\\' OR answer LIKE ? ESCAPE '\\'" if search else ""
    escaped = (search or "").replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    words = [f"%{escaped}%"] * 2 if search else []
    with _opened() as log:
        query = f"SELECT {_COLUMNS} FROM answers {found} ORDER BY id DESC LIMIT ?"  # noqa: S608  constants
        return [Entry(*row) for row in log.execute(query, (*words, most))][::-1]


def conversation() -> list[Entry]:
    """The last answer's conversation, its first answer first; empty without one."""
    if not path().exists():
        return []
    with _opened() as log:
        query = (
            f"SELECT {_COLUMNS} FROM answers WHERE conversation = "  # noqa: S608  constants
            "(SELECT conversation FROM answers ORDER BY id DESC LIMIT 1) ORDER BY id"
        )
        return [Entry(*row) for row in log.execute(query)]


@contextmanager
def _opened() -> Iterator[sqlite3.Connection]:
    place = path()
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(place, os.O_RDWR | os.O_CREAT, 0o600))
        log = sqlite3.connect(place)
        try:
            with log:
                log.execute(_TABLE)
                yield log
        finally:
            log.close()
    except (OSError, sqlite3.Error) as error:
        raise LongspecError(
            f"The log {place} can't be used: {error}; mend or remove it, or leave --log out."
        ) from error
