"""A file is replaced whole or stays as it was, and keeps its mode."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from longspec.errors import ModelError, UsageError
from longspec.machine.files import read_bytes, read_json, replaced


@pytest.mark.parametrize(("private", "mode"), [(True, 0o600), (False, 0o644)])
def test_the_mode_of_a_file(tmp_path: Path, private: bool, mode: int) -> None:
    path = tmp_path / "file"
    replaced(path, lambda place: place.write_text("first"), private=private)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    path.chmod(0o640)
    replaced(path, lambda place: place.write_text("second"), private=private)
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (0o640, "second")


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("first")

    def fail(place: Path) -> None:
        place.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        replaced(path, fail)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "first"


def test_json_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"a": 1}')
    (link := tmp_path / "link").symlink_to(path)
    assert read_json(path, 8, "The file") == read_json(link, 8, "The file") == {"a": 1}
    with pytest.raises(UsageError, match=r"^The file .*/file holds more than 0 KiB\.$"):
        read_json(path, 7, "The file")
    with pytest.raises(ModelError, match=r"^The file .* can't be read: No such file or directory; write one\.$"):
        read_json(tmp_path / "none", 8, "The file", hint="write one", error=ModelError)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 50_000, "\0"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"isn't a JSON object\.$"):
        read_json(path, 1 << 16, "The file")


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")  # whose open would wait for a writer
    with pytest.raises(UsageError, match=r"The file .*pipe isn't an ordinary file\.$"):
        read_bytes(pipe, 8, "The file")
    with pytest.raises(UsageError, match="can't be read: Is a directory"):
        read_bytes(tmp_path, 8, "The file")
    with pytest.raises(UsageError, match="isn't an ordinary file"):
        read_bytes(Path("/dev/zero"), 8, "The file")
    with pytest.raises(UsageError, match="holds more than"):
        read_bytes(Path("/dev/zero"), 8, "The file", pipe=True)
