"""Parquet, in and out: rows as the fields of records, and lines of the output as rows with a few columns of their own.

pyarrow is imported where it is used: it comes with the extra `ray`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any, BinaryIO

from longspec.errors import UsageError

__all__ = ["lines", "rows", "table"]

_ROWS = 256
"""Rows that are held at a time."""


def rows(file: BinaryIO, name: str) -> tuple[Iterator[dict[str, Any]], int]:
    """Each row's fields that aren't null, and the number of rows. UsageError: it isn't Parquet."""
    parquet = _pyarrow(name)
    from pyarrow import ArrowException

    try:
        opened = parquet.ParquetFile(file)
    except (ValueError, OSError, ArrowException) as error:  # pyarrow's errors are these
        raise UsageError(f"{name} isn't a Parquet file: {str(error).splitlines()[0][:200]}.") from error

    def read() -> Iterator[dict[str, Any]]:
        try:
            for batch in opened.iter_batches(_ROWS):
                for row in batch.to_pylist():
                    yield {field: value for field, value in row.items() if value is not None}
        except (ValueError, OSError, ArrowException) as error:
            raise UsageError(f"{name} is damaged: {str(error).splitlines()[0][:200]}.") from error

    return read(), int(opened.metadata.num_rows)


def table(lines: Sequence[bytes]) -> bytes:
    """A file of these lines of the output: its columns are what most readers want, and `line`, which has all of it."""
    parquet = _pyarrow("The output")
    import pyarrow

    strings, numbers = ("id", "text", "finish_reason", "error"), ("index", "prompt_tokens", "completion_tokens")
    found = [_cells(json.loads(line)) for line in lines]
    columns = {
        **{name: pyarrow.array([row.get(name) for row in found], pyarrow.string()) for name in strings},
        **{name: pyarrow.array([row.get(name) for row in found], pyarrow.int64()) for name in numbers},
        "line": pyarrow.array([line.decode().rstrip("\n") for line in lines], pyarrow.string()),
    }
    file = BytesIO()
    parquet.write_table(pyarrow.table(columns), file, compression="zstd")
    return file.getvalue()


def lines(data: bytes, name: str) -> list[bytes]:
    """The lines of which `table` made this file. UsageError: it made no such file."""
    found, _ = rows(BytesIO(data), name)
    try:
        return [row["line"].encode() + b"\n" for row in found]
    except (KeyError, AttributeError):
        raise UsageError(f"{name} wasn't written by longspec batch: it has no column 'line'.") from None


def _cells(line: dict[str, Any]) -> dict[str, Any]:
    """What of a line has a column. An OpenAI line has its texts in `line` alone."""
    name, error, usage = line.get("custom_id", line.get("id")), line.get("error"), line.get("usage", {})
    return {
        "id": None if name is None else str(name),
        "index": line.get("index"),
        "text": line.get("text"),
        "finish_reason": line.get("finish_reason"),
        "error": None if error is None else error["message"],
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
    }


def _pyarrow(name: str) -> Any:
    if find_spec("pyarrow") is None:
        raise UsageError(f"{name} is Parquet, which needs pyarrow; install it by pip install 'longspec[ray]'.")
    import pyarrow.parquet

    return pyarrow.parquet
