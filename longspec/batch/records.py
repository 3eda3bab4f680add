"""One line of the output: an answer or an error as an object, and the parsing of such an object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longspec.batch.marks import DUPLICATE, mark_id, mark_index
from longspec.batch.openai import response
from longspec.batch.requests import Fault, Item, checked_id

if TYPE_CHECKING:
    from longspec.engine.answer import Answer
    from longspec.types import Stats

__all__ = ["Outcome", "Past", "Written", "line", "outcome", "past"]

_REQUEST = "batch_req_"


@dataclass(frozen=True, slots=True)
class Written:
    """A record and its answer."""

    item: Item
    answer: Answer
    stats: Stats

    @property
    def index(self) -> int:
        return self.item.index


@dataclass(frozen=True, slots=True)
class Past:
    """The fields of an output line that resuming needs."""

    mark: int
    failed: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """A result as the output and the statistics take it: it goes from one process to another."""

    line: bytes
    mark: int  # of the record: what `past` reads out of the line
    prompt_tokens: int = 0
    stats: Stats | None = None  # None of a record that failed


def outcome(result: Written | Fault, *, openai: bool) -> Outcome:
    data = line(result, openai=openai)
    if isinstance(result, Fault):
        name = None if result.code == DUPLICATE else result.id
        return Outcome(data, mark_index(result.index) if name is None else mark_id(name))
    return Outcome(data, mark_id(result.item.id), result.answer.usage["prompt_tokens"], result.stats)


def line(result: Written | Fault, *, openai: bool) -> bytes:
    """The whole line, in UTF-8."""
    record = _openai(result) if openai else _plain(result)
    return json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"


def past(record: Mapping[str, Any]) -> Past:
    """Parse an output line's object. Raises ValueError where it wasn't written by longspec."""
    error, index = record.get("error"), record.get("index")
    if "custom_id" in record:
        name, own = record["custom_id"], str(record.get("id"))
        index = int(own.removeprefix(_REQUEST)) if own.removeprefix(_REQUEST).isdecimal() else None
        whole = record.get("response") is not None or error is not None
    else:
        name = record.get("id")
        whole = "text" in record or error is not None
    if not isinstance(index, int) or not whole or not isinstance(error, dict | None):
        raise ValueError("it isn't a line of a batch's output")
    alone = name is None or (error or {}).get("code") == DUPLICATE
    return Past(mark_index(index) if alone else mark_id(checked_id(name, None, "id")), error is not None)


def _plain(result: Written | Fault) -> dict[str, Any]:
    if isinstance(result, Fault):
        return {"id": result.id, "index": result.index, "error": _error(result)}
    return {"id": result.item.id, "index": result.index, **result.answer.report()}


def _openai(result: Written | Fault) -> dict[str, Any]:
    own = {"id": f"{_REQUEST}{result.index}"}
    if isinstance(result, Fault):
        return {**own, "custom_id": result.id, "response": None, "error": _error(result)}
    return {**own, "custom_id": result.item.id, "response": response(result.item, result.answer), "error": None}


def _error(fault: Fault) -> dict[str, str]:
    return {"code": fault.code, "message": fault.reason}
