"""`longspec command`: what is flagged, what is a command at all, and what the default model makes of requests."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from longspec.cli.danger import judge

DATA: dict[str, Any] = tomllib.loads((Path(__file__).parent / "command.toml").read_text())


def lines(name: str) -> list[str]:
    return str(DATA[name]).strip().splitlines()


@pytest.mark.parametrize("line", lines("destructive"))
def test_what_destroys_is_flagged(line: str) -> None:
    assert judge(line)


@pytest.mark.parametrize("line", lines("harmless"))
def test_what_is_harmless_is_not_flagged(line: str) -> None:
    assert judge(line) == ()
