"""`longspec command`: what is flagged, what is a command at all, and what the default model makes of requests."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tomllib
from pathlib import Path
from time import time
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


def scratch(folder: Path) -> Path:
    """The folder that requests are about."""
    for name in ("src", "empty"):
        (folder / name).mkdir(parents=True)
    texts = {
        "notes.txt": "".join(f"note {i}\n" for i in range(1, 13)),
        "fruits.txt": "apple\nbanana\ncherry\napple\nbanana\napple\nfig\n",
        "numbers.txt": "3\n14\n7\n25\n1\n",
        "people.csv": "name,age,city\nAda,36,London\nBen,30,Oslo\nCy,41,Rome\n",
        "app.log": "2026-01-01 INFO start\n2026-01-02 ERROR disk full\n2026-01-03 INFO retry\n"
        "2026-01-04 ERROR timeout\n2026-01-05 INFO stop\n",
        "user.json": '{"name": "Ada", "age": 36}\n',
        "src/main.py": "import util\n# TODO: more\nprint(util.x)\n",
        "src/util.py": "x = 1\n",
        "old.txt": "old\n",
        "empty.dat": "",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "big.bin").write_bytes(b"\0" * (3 << 20))
    past = time() - 30 * 86_400
    os.utime(folder / "old.txt", (past, past))
    with tarfile.open(folder / "archive.tar.gz", "w:gz") as archive:
        for name in ("one.txt", "two.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    return folder


def does(line: str, asked: dict[str, Any], folder: Path) -> bool:
    """Whether a command, run in a scratch folder, gives what was asked for. A flagged one isn't run."""
    if judge(line):
        return False
    home = {**os.environ, "HOME": str(folder)}
    try:
        done = subprocess.run(
            ["bash", "-c", line], cwd=scratch(folder), env=home, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=10,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    if "made" in asked:
        return done.returncode == 0 and all((folder / name).exists() for name in asked["made"])
    said = [each.strip().removeprefix("./") for each in done.stdout.splitlines() if each.strip()]
    if "first" in asked and said[:1] != [asked["first"]]:
        return False
    return sorted(said) in [asked["want"], asked.get("or")]
