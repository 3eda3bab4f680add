"""A drafter of another package: the one that docs/drafters.md shows, installed as pip installs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.engines import engine, prompts, tiny

from longspec.drafters.spec import parse
from longspec.errors import UsageError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "drafters.md"


def example(folder: Path) -> Path:
    """The package of the page, written to a folder."""
    text = PAGE.read_text(encoding="utf-8").split("## From another package")[1]
    (module,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (project,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(module.splitlines()) <= 20
    (folder / "echo_drafter.py").write_text(module)
    (folder / "pyproject.toml").write_text(project)
    return folder


def test_a_package_adds_a_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no drafter named 'echo'"):
        parse("echo")
    (tmp_path / "package").mkdir()
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(target), str(example(tmp_path / "package"))], check=True)
    monkeypatch.syspath_prepend(str(target))
    model = tiny(tmp_path / "model", end_tokens=())
    plain = engine(model).generate(prompts(1)[0], raw=True, max_new_tokens=30)
    for name in ("echo", "echo:length=3", "recycle+echo:length=3"):
        answer = engine(model, name).generate(prompts(1)[0], raw=True, max_new_tokens=30)
        assert answer.tokens == plain.tokens
        assert answer.speculation["drafted"] > 0
    for wrong in ("long", "-2", "-1", "1.5", str(1 << 62), "9" * 5000):
        with pytest.raises(UsageError, match=r"length=.* of the drafter echo should be a number from 0 to 1,048,576"):
            parse(f"echo:length={wrong}")


def test_what_is_no_drafter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "odd-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[longspec.drafters]\nodd = json:loads\nlost = nowhere_at_all:It\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=r"The drafter odd of the package odd is no subclass of longspec\.Drafter"):
        parse("odd")
    with pytest.raises(UsageError, match=r"The drafter lost of the package odd can't be imported \(No module named"):
        parse("lost")
