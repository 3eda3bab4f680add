"""The table of methods: it lacks nothing that longspec does and no paper that is named, and its page is made of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from methods import PAGE, to_markdown

from longspec.cache import CACHES
from longspec.cli.app import program
from longspec.control import CONTROLS
from longspec.drafters import DRAFTERS
from longspec.drafters.spec import parse
from longspec.heads import KINDS
from longspec.methods import GROUPS, every, options

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"\b\d{4}\.\d{5}\b")
FOUNDATIONS = """
2405.00263 2408.00264 2310.18813 2410.05589 2410.13344 2506.03700 2404.14897 2308.04623
2404.12022 2605.11215 2506.01986 2401.07851 2511.20340 2310.12072 2411.13157 2512.22420
2605.16786 2503.16163 2602.03708 2402.02057 2406.07368
"""
"""The papers that longspec is built from."""


def named(flag: str) -> set[str]:
    """What the table's options give to a flag."""
    found = " ".join(options())
    return {name for said in re.findall(rf"{flag} (\S+)", found) for name in re.split(r"[+:]", said)}


@pytest.mark.parametrize(
    ("flag", "registered"),
    [
        ("--drafter", [*DRAFTERS, *KINDS]),
        ("--cache", [name for name in CACHES if " " not in name]),
        ("--control", [*CONTROLS]),
    ],
)
def test_all_that_is_registered_has_a_row(flag: str, registered: Iterable[str]) -> None:
    assert [name for name in registered if name not in named(flag)] == []


def test_every_paper_that_is_named_has_a_row() -> None:
    known = {method.paper for method in every()}
    pages = [path for path in (ROOT / "docs").glob("*.md") if path != PAGE]
    pages += [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    pages += [path for room in ("drafters", "heads", "control") for path in (ROOT / "longspec" / room).rglob("*.py")]
    pages += (ROOT / "cache").glob("*.py")
    lacking = {
        (path.name, number)
        for path in pages
        for number in NUMBER.findall(path.read_text(encoding="utf-8"))
        if number not in known
    }
    assert lacking == set()
    assert set(FOUNDATIONS.split()) <= known


def test_what_a_row_says_to_type_is_understood() -> None:
    own = program().commands
    below = [sub for command in own.values() for sub in getattr(command, "commands", {}).values()]  # as of `bench`
    flags = {flag for command in (*own.values(), *below) for option in command.params for flag in option.opts}
    for option in options():
        words = option.split()
        if words[0] == "longspec":
            assert words[1] in own, option
        assert {word for word in words if word.startswith("--")} <= flags, option
        if words[0] == "--drafter" and words[1] != "FOLDER":
            parse(words[1], {"draft": "some"} if "model" in words[1] else {})


def test_rows_are_whole() -> None:
    for method in every():
        assert NUMBER.fullmatch(method.paper) or not method.paper, method
        assert method.drafter in ("", "independent", "self"), method
        assert method.centre in ("", "draft", "model"), method
        assert method.note, method
        assert not method.note.endswith("."), method
        assert not (method.option and method.planned), method
    for title, methods in GROUPS.items():
        names = [method.name for method in methods]
        assert len(names) == len(set(names)), title


def test_the_page_is_made_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == to_markdown(), "run `python docs/methods.py`"


def test_the_table_imports_nothing_heavy() -> None:
    seen = "import longspec.methods, sys; print([m for m in ('numpy', 'torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
