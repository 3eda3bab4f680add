"""Outputs that are folders of files, Parquet in and out, and files by URL."""

from __future__ import annotations

import fcntl
import json
import os
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from longspec.batch import parts
from longspec.batch.about import About
from longspec.batch.inputs import open_input
from longspec.batch.parquet import rows
from longspec.batch.parts import Parts
from longspec.batch.requests import Item
from longspec.cli.main import guarded
from longspec.errors import LongspecError, UsageError

KINDS = ["jsonl", *(["parquet"] if find_spec("pyarrow") else [])]
needs_pyarrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow isn't installed: the extra `ray`")

SETTINGS = ["--threads", "1", "--dtype", "fp32", "--max-new-tokens", "5"]


def name_of(folder: Path, kind: str) -> str:
    return f"{folder}/out.parquet" if kind == "parquet" else f"{folder}/out/"


def line(i: int, *, failed: bool = False) -> bytes:
    said: dict[str, Any] = {"id": f"n{i}", "index": i}
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    said |= {"error": {"code": "failed", "message": "no"}} if failed else {"text": f"a\r\u2028{i}", "usage": usage}
    return json.dumps(said, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(parts, "_LINES", 4)
    name = name_of(tmp_path, kind)
    with Parts(name) as out:
        assert out.is_empty
        About(out, anyway=False).write({"weights": "w"})
        for i in range(10):
            out.write(line(i, failed=i == 5))
        assert len(list(Path(name).glob("part-*"))) == 2  # the last two lines wait
    Path(f"{name}/part-00000003.{kind}.tmp").write_bytes(b"half a fi")  # what a kill leaves
    with Parts(name) as out:
        marks, failed = out.finished()
        assert (len(marks), failed) == (10, 1)
        with pytest.raises(UsageError, match="another weights"):
            About(out, anyway=False).check({"weights": "v"})
        assert out.finished(retry_errors=True)[1] == 0
        out.write(line(5))
    with Parts(name) as out:
        marks, failed = out.finished()
        assert (len(marks), failed) == (10, 0)
    assert len(list(Path(name).glob(f"part-*.{kind}"))) == 4


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="Another process is writing"):
        Parts(f"{tmp_path}/out/")
    os.close(held)
    Parts(f"{tmp_path}/out/").close()


def test_what_cant_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written: "):
        Parts(f"{tmp_path}/file/out/")
    with pytest.raises(UsageError, match="can't be opened: Protocol not known: nowhere"):
        Parts("nowhere://bucket/out")
    out = Parts(f"{tmp_path}/out/")
    out.write(line(1))
    (tmp_path / "out").rmdir()
    with pytest.raises(LongspecError, match=r"part-00000001\.jsonl can't be written: No such file"):
        out.close()


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_files_are_refused(tmp_path: Path, kind: str) -> None:
    name = name_of(tmp_path, kind)
    Path(name).mkdir()
    Path(f"{name}/part-00000001.{kind}").write_bytes(b'{"mine": 1}\n')
    with Parts(name) as out, pytest.raises(UsageError, match=r"wasn't written by longspec|isn't a Parquet file"):
        out.finished()


def test_objects_are_read_and_written_by_url(tiny: str, home: Path) -> None:
    """Fsspec's own storage in memory: no renames, no locks, no file numbers."""
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe_file("/in.jsonl", b'{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two"}\n')
    arguments = ["batch", "memory://in.jsonl", "-o", "memory://answers", "-m", tiny, *SETTINGS]
    assert guarded(arguments) == 0
    (part,) = files.glob("/answers/part-*.jsonl")
    assert sorted(json.loads(line)["id"] for line in files.cat_file(part).splitlines()) == ["a", "b"]
    assert guarded(arguments) == 0
    assert len(files.glob("/answers/part-*.jsonl")) == 1
    files.pipe_file("/in.jsonl", b'{"id": "a", "prompt": "other"}\n')
    assert guarded(arguments) == 2  # another input
    files.rm("/answers", recursive=True)
    with pytest.raises(UsageError, match="memory://none can't be read"), open_input(["memory://none"]):
        pass


@needs_pyarrow
def test_damaged_parquet_is_read_or_refused() -> None:
    """Each byte of what describes its columns; pyarrow raises errors of its own for some."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None] * 9, "id": list(range(18))}), file := BytesIO())
    whole = file.getvalue()
    refused = 0
    for at in range(1, len(whole)):
        for change in (1, 0x55, 0xFF):
            damaged = bytearray(whole)
            damaged[-at] ^= change
            try:
                [*rows(BytesIO(damaged), "it")[0]]
            except UsageError:
                refused += 1
    assert refused > 1000


@needs_pyarrow
def test_parquet_in_and_out(tiny: str, home: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    chat = [{"role": "user", "content": "hi"}]
    rows = [{"id": "a", "prompt": "one", "max_new_tokens": 3}, {"id": "b", "messages": chat}, {"id": "c"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows[:1], *rows[1:]], _schema()), home / "in.parquet")
    with open_input([str(home / "in.parquet")]) as source:
        found = list(source.records)
        assert (source.format, source.count) == ("parquet", 3)
    assert [type(one).__name__ for one in found] == ["Item", "Item", "Fault"]
    assert isinstance(found[1], Item)
    assert found[1].prompt == chat
    assert guarded(["batch", str(home / "in.parquet"), "-o", str(home / "out.parquet"), "-m", tiny, *SETTINGS]) == 1
    table = {row["id"]: row for row in pyarrow.parquet.read_table(home / "out.parquet").to_pylist()}
    assert (table["a"]["completion_tokens"], table["b"]["completion_tokens"]) == (3, 5)
    assert table["a"]["text"] == json.loads(table["a"]["line"])["text"]
    assert "must have either" in table["c"]["error"]
    (home / "bad.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UsageError, match="isn't a Parquet file"), open_input([str(home / "bad.parquet")]):
        pass


def _schema() -> Any:
    import pyarrow

    said = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    text, number = pyarrow.string(), pyarrow.int64()
    return pyarrow.schema(
        [("id", text), ("prompt", text), ("max_new_tokens", number), ("messages", pyarrow.list_(said))]
    )
