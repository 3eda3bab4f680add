"""Tables at terminals of any width."""

from __future__ import annotations

import os

import pytest

from longspec.cli.io import progress
from longspec.cli.io.progress import table

ROWS = [("CACHE", "BYTES", "FITS"), ("dense", "93 MiB", "yes"), ("int8 *", "51 MiB", "no: needs more")]


def test_columns_stand_side_by_side_where_they_fit() -> None:
    """And in a pipe, where nobody says how wide a line may be."""
    assert table(ROWS, right=(1,)).splitlines() == [
        "CACHE    BYTES  FITS",
        "dense   93 MiB  yes",
        "int8 *  51 MiB  no: needs more",
    ]


@pytest.mark.parametrize("width", [29, 20])
def test_a_narrow_terminal_gets_words_and_none_is_split(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda stream: True)
    monkeypatch.setattr(progress, "_columns", lambda stream: width)
    said = table(ROWS, right=(1,))
    assert max(map(len, said.splitlines())) <= width
    assert " ".join(said.split()) == (
        "CACHE dense: bytes 93 MiB, fits yes CACHE int8 *: bytes 51 MiB, fits no: needs more"
    )
