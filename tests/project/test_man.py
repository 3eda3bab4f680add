"""The manual pages say what the command says, and are roff."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from man import FOLDER, exit_codes, manual
from reference import pages


def test_the_manual_is_what_the_command_says() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    made = manual()
    changed = sorted(name for name in {*there, *made} if there.get(name) != made.get(name))
    assert changed == [], "run `make man`: these pages in docs/man aren't what the command says"


def test_every_option_is_on_its_page() -> None:
    made = manual()
    for page in pages():
        text = made[f"{page.name}.1"].replace("\\-", "-").replace("\\&", "")
        for entries in page.options.values():
            for written, _ in entries:
                assert f".B {written}\n" in text, page.words


def test_exit_codes_come_from_the_table() -> None:
    assert {"0", "1", "2", "3", "4", "130", "141", "143"} <= {code for code, _ in exit_codes()}


def test_roff_has_nothing_to_warn_of() -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff isn't installed")
    for path in sorted(FOLDER.iterdir()):
        done = subprocess.run(["groff", "-man", "-ww", "-Tutf8", path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), path.name
        assert done.stdout.startswith(f"{path.stem.upper()}(1)")
