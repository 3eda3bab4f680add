"""The input of a batch, in any of its formats, as a stream of records.

Takes names from a command line; gives Items and Faults, one by one. Nothing is read ahead but the first line, which
tells the format where the file name's suffix doesn't. Knows no model.
"""

from __future__ import annotations

import csv
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from longspec.batch import FORMATS, parquet
from longspec.batch.lines import LINE_NBYTES, Line, as_text, names, read_lines
from longspec.batch.openai import is_openai, openai_request
from longspec.batch.remote import Object, is_url, open_url
from longspec.batch.requests import Fault, Id, Item, checked_id, fault, request
from longspec.batch.template import Template
from longspec.errors import UsageError
from longspec.requests.fields import RequestError, parse_object

__all__ = ["Input", "open_input"]

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "lines",
}
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Input:
    """An open input. digest: a hash of all its bytes; None for a pipe, which can be read only once."""

    format: str
    records: Iterator[Item | Fault]
    digest: str | None = None
    count: int | None = None  # approximate number of records


@contextmanager
def open_input(
    given: Sequence[str],
    *,
    form: str | None = None,
    template: str | None = None,
    files_from: str | None = None,
    null: bool = False,
) -> Iterator[Input]:
    """Open one file of records, `-` for standard input, or many files of one prompt each. form: one of FORMATS, if
    named.

    Raises:
        UsageError: there is no such input, or its format can't be detected.
    """
    if form is not None and form not in FORMATS:
        raise UsageError(f"The format {form!r} is not known; use one of: {', '.join(FORMATS)}.")
    filled = None if template is None else Template(template)
    if null and files_from is None:
        raise UsageError("-0 says how the names of --files-from are separated; give --files-from too.")
    if files_from is not None:
        if given or form not in (None, "files"):
            raise UsageError("--files-from names the inputs; leave IN and --format out.")
        with _opened(files_from) as file:
            digest, _ = _digest(file)
            yield Input("files", _files(_listed(file, files_from, b"\0" if null else b"\n"), filled), digest)
        return
    if not given:
        raise UsageError("There is no input; name a file, - for standard input, or --files-from LIST.")
    if len(given) > 1 and form is None:
        tables = [name for name in given if Path(name).suffix.lower() in _SUFFIXES and not name.endswith(".txt")]
        if tables:
            raise UsageError(
                f"Several inputs are one prompt each, and {tables[0]} holds records; join such files (cat ... | "
                "longspec batch -), or give --format files."
            )
    if form == "files" or (form is None and len(given) > 1):
        yield _many(given, filled)
        return
    if len(given) > 1:
        raise UsageError(f"--format {form} is for one input, and there are {len(given)}; join them with cat.")
    with _opened(given[0]) as file:
        yield _one(file, given[0], form, filled)


def _one(file: BinaryIO, name: str, form: str | None, template: Template | None) -> Input:
    digest, count = _digest(file)
    if form == "parquet" or (form is None and Path(name).suffix.lower() == ".parquet"):
        rows, count = parquet.rows(file, name)
        return Input("parquet", (request(i, i + 1, row, template) for i, row in enumerate(rows)), digest, count)
    lines = read_lines(file)
    first = next((line for line in lines if not line.is_blank), None)
    form = form or _told(name, first)
    if form == "openai" and template is not None:
        raise UsageError("Requests in OpenAI's format bring their prompts; leave --template out.")
    whole = chain(() if first is None else (first,), lines)
    if form in ("csv", "tsv"):
        return Input(form, _table(whole, form, template), digest, None if count is None else max(0, count - 1))
    if template is not None and form == "lines":
        _holds(template, {"text"}, "a line")
    readers = {"jsonl": _objects, "openai": _openai, "lines": _texts}
    return Input(form, readers[form](whole, template), digest, count)


def _told(name: str, first: Line | None) -> str:
    """Detect the format, by the file name's suffix and the first non-blank line."""
    form = _SUFFIXES.get(Path(name).suffix.lower())
    start = "" if first is None else first.text.lstrip()
    if form is None and start.startswith("{"):
        form = "jsonl"
    if form is None and (name == "-" or first is None):
        form = "lines"
    if form is None:
        raise UsageError(
            f"{name} may be one prompt, or one on every line; say --format files or --format lines (or another of "
            f"{', '.join(FORMATS)})."
        )
    if form == "jsonl" and start:
        with suppress(RequestError):
            return "openai" if is_openai(parse_object(start, "the line")) else "jsonl"
    return form


def _opened(name: str) -> BinaryIO:
    if is_url(name):
        return open_url(name)
    try:
        return open(0 if name == "-" else name, "rb", closefd=name != "-")
    except OSError as error:
        raise UsageError(f"{name} can't be read: {error.strerror}; name a file, or - for standard input.") from error


def _digest(file: BinaryIO) -> tuple[str | None, int | None]:
    """The hash of all bytes of a regular file, and its number of lines; the file is rewound to its start. Of an object
    elsewhere its version, as its storage knows it.
    """
    if isinstance(file, Object):
        return file.version, None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return None, None
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    file.seek(0)
    while data := file.read(_CHUNK):
        digest.update(data)
        lines, last = lines + data.count(b"\n"), data[-1:]
    file.seek(0)
    return digest.hexdigest(), lines + (last != b"\n")


def _objects(lines: Iterator[Line], template: Template | None) -> Iterator[Item | Fault]:
    for index, line, fields in _parsed(lines):
        yield fields if isinstance(fields, Fault) else request(index, line.number, fields, template)


def _openai(lines: Iterator[Line], template: Template | None) -> Iterator[Item | Fault]:
    for index, _, fields in _parsed(lines):
        yield fields if isinstance(fields, Fault) else openai_request(index, fields)


def _parsed(lines: Iterator[Line]) -> Iterator[tuple[int, Line, dict[str, Any] | Fault]]:
    """Each non-blank line with its index, and its object or the error."""
    for index, line in enumerate(line for line in lines if not line.is_blank):
        fault = line.fault
        if fault is None:
            try:
                yield index, line, parse_object(line.text, "it")
                continue
            except RequestError as wrong:
                fault = str(wrong)
        yield index, line, Fault(index, None, f"line {line.number}: {fault}")


def _texts(lines: Iterator[Line], template: Template | None) -> Iterator[Item | Fault]:
    for index, line in enumerate(line for line in lines if not line.is_blank):
        if line.fault is not None:
            yield Fault(index, None, f"line {line.number}: {line.fault}")
        else:
            yield Item(index, line.number, line.text if template is None else template.fill({"text": line.text}), {})


def _table(lines: Iterator[Line], form: str, template: Template | None) -> Iterator[Item | Fault]:
    """Records of a table with a header. The column `id` gives a record's id, else its number, from 1 below the
    header.
    """
    csv.field_size_limit(LINE_NBYTES)
    faults: list[str] = []

    def texts() -> Iterator[str]:
        for line in lines:
            if line.fault is not None:
                faults.append(f"line {line.number}: {line.fault}")
            yield line.text + "\n"

    reader = csv.reader(texts(), "excel" if form == "csv" else "excel-tab", strict=True)
    header = _next_row(reader)
    if isinstance(header, str) or faults:
        raise UsageError(f"The header of the table can't be read: {faults[0] if faults else header}.")
    header = [name.strip() for name in header or []]
    _holds(template, header, "the table") if template is not None else _holds(Template("{prompt}"), header, "the table")
    index = 0
    while (row := _next_row(reader)) is not None:
        fault, number = (faults[0] if faults else row if isinstance(row, str) else None), index + 1
        faults.clear()
        if fault is None and not any(cell.strip() for cell in row):
            continue
        if fault is None and len(row) != len(header):
            fault = f"row {number} has {len(row)} fields, and the header has {len(header)}"
        if fault is not None:
            yield Fault(index, None, fault)
        else:
            fields = {name: cell for name, cell in zip(header, row, strict=True) if name and cell}
            yield _row(index, fields, dict(zip(header, row, strict=True)), template)
        index += 1


def _row(index: int, fields: dict[str, str], cells: dict[str, str], template: Template | None) -> Item | Fault:
    name: Id | None = None
    try:
        name = checked_id(fields.get("id"), index + 1, "id")
        prompt = cells["prompt"] if template is None else template.fill(cells)
        if not prompt.strip():
            raise ValueError("'prompt' is empty")
    except Exception as wrong:  # noqa: BLE001  no record may end the batch
        return fault(index, name, wrong)
    return Item(index, name, prompt, {})


def _next_row(reader: Iterator[list[str]]) -> list[str] | str | None:
    """The next row, an error message, or None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:
        return f"line {getattr(reader, 'line_num', '?')}: {error}"


def _holds(template: Template, fields: Sequence[str] | set[str], what: str) -> None:
    lacking = sorted(template.names - set(fields))
    if lacking:
        there = ", ".join(sorted(fields)) or "nothing"
        raise UsageError(f"The prompt is {template.text!r}, and {what} has no {lacking[0]!r}; it has: {there}.")


def _many(given: Sequence[str], template: Template | None) -> Input:
    """The input of many files with one prompt each; the digest is of their names and contents."""
    digest: hashlib._Hash | None = hashlib.sha256()
    for name in given:
        with suppress(OSError), open(name, "rb") as file:
            assert digest is not None
            own, _ = _digest(file)
            digest.update(f"{name!r} {own}\n".encode())
    assert digest is not None
    return Input("files", _files(iter(given), template), digest.hexdigest(), len(given))


def _listed(file: BinaryIO, name: str, end: bytes) -> Iterator[str]:
    try:
        for data in names(file, end):
            yield os.fsdecode(data.removesuffix(b"\r") if end == b"\n" else data)
    except ValueError as wrong:
        raise UsageError(
            f"{name} is no list of files: {wrong}; separate them by newlines, or by NUL with -0."
        ) from None


def _files(given: Iterator[str], template: Template | None) -> Iterator[Item | Fault]:
    if template is not None:
        _holds(template, {"text", "path"}, "a file")
    for index, name in enumerate(given):
        known: Id | None = None
        try:
            known = checked_id(name, None, "the file's name")
            text = _text_of(name)
        except (ValueError, OSError) as wrong:
            reason = f"{name!r} can't be read: {wrong.strerror}" if isinstance(wrong, OSError) else str(wrong)
            yield Fault(index, known, reason)
        else:
            yield Item(index, known, text if template is None else template.fill({"text": text, "path": name}), {})


def _text_of(name: str) -> str:
    with ExitStack() as stack:
        data = stack.enter_context(open(name, "rb")).read(LINE_NBYTES + 1)
    if len(data) > LINE_NBYTES:
        raise ValueError(f"the file has more than {LINE_NBYTES:,} bytes")
    text, fault = as_text(data.removeprefix(b"\xef\xbb\xbf"), "the file")
    if fault is not None:
        raise ValueError(fault)
    if not text.strip():
        raise ValueError("the file is empty")
    return text.rstrip("\r\n")
