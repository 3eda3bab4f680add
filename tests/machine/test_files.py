"""A file is replaced whole or stays as it was, and keeps its mode."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from longspec.machine.files import replaced


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
