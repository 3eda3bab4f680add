"""docs/cli.md's table of every command: each line is run, and no command is without its lines.

What no signal, pipe or redirection is in is run in this process, all else as one of its own.

With a tiny model that writes as long as it may: where no event ends a line, `LONGSPEC_MAX_NEW_TOKENS` does.
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import pytest
from _pytest.mark import ParameterSet
from reference import Page, pages
from support import forked
from support.commands import ROOT, SECONDS, environment, inside

from longspec.heads.format import new_head, save_head
from longspec.machine.system import cache_folder
from longspec.model.load import open_model

EVENTS = ("", "SIGINT", "SIGTERM", "stdout closed")
OUT = ("", "nothing", "text", "one line", "lines", "JSON", "what was written")
ERR = ("nothing", "a sentence", "notes")
UNDER_WAY = 8.0
"""Seconds after which a command that says nothing while it works is taken to be at work."""

LATE = {"train eagle --prompts suite.jsonl -o head"}
"""What is refused only when torch is there: the names of heads are a dict of its modules."""

PLAIN = 'longspec run "Hello"'
"""One that ends well is a process all the same."""

LOADS = re.compile("longspec (run|chat|batch|command|serve|plan|train|tune|bench .*)")

WORDS = [page.words for page in pages()]

FILES: dict[str, str | bytes] = {
    "lines.txt": "one\ntwo\n",
    "bad-lines.txt": b"one\n\xff\n",
    "prompts.jsonl": '{"prompt": "one"}\n{"prompt": "two", "max_new_tokens": 2}\n',
    "bad-lines.jsonl": '{"prompt": "one"}\n{"prompt": 2}\n',
    "suite.jsonl": '{"category": "qa", "turns": ["one"]}\n{"category": "qa", "turns": ["two"]}\n',
    "text.txt": "The sky is blue, and the sea is green. " * 80,
}


@dataclass(frozen=True)
class Line:
    command: str
    event: str
    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"{self.command.removeprefix('longspec ')}{' ' if self.event else ''}{self.event}"

    @property
    def of(self) -> str:
        """The command that it runs, by its words."""
        return max((words for words in WORDS if f"{self.command} ".startswith(f"{words} ")), key=len)

    @property
    def shows(self) -> bool:
        """Whether one sees that it is at its work: by its stdout, its address, or the file that it begins."""
        if self.of in ("longspec batch", "longspec serve") or "-o answer" in self.command:
            return True
        return self.out == "what was written" or (self.event == "stdout closed" and self.of != "longspec models")

    @property
    def slow(self) -> bool:
        """What loads torch takes a second or more: `run` and the end by SIGTERM are enough for every day."""
        if not LOADS.match(self.of) or self.code == 2:
            return False
        if self.of == "longspec run":
            return bool(self.event) and not self.shows
        return not (self.event == "SIGTERM" and self.shows)

    @property
    def inside(self) -> bool:
        """Whether no process of its own is needed to see what it does."""
        return not (self.event or re.search("[<>]", self.command) or self.slow or self.command == PLAIN)


def table() -> list[Line]:
    section = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("## Every command\n")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("|")][2:]
    cells = [re.fullmatch(r"\| `(longspec[^`]*)` \| (.*?) ?\| (\d+) \| (.*?) ?\| (.*?) \|", row) for row in rows]
    assert all(cells), [row for row, found in zip(rows, cells, strict=True) if found is None]
    return [Line(cell[1], cell[2], int(cell[3]), cell[4], cell[5]) for cell in cells if cell]


def leaves() -> list[Page]:
    return [page for page in pages() if not page.commands]


def test_every_command_has_its_lines() -> None:
    """One that goes well, one that is used wrongly; where a model is loaded, a signal and a model that isn't there."""
    lines = table()
    assert {line.event for line in lines} <= set(EVENTS)
    assert {line.out for line in lines} <= set(OUT)
    assert {line.err for line in lines} <= set(ERR)
    assert len({(line.command, line.event) for line in lines}) == len(lines)
    missing: list[tuple[str, object]] = []
    for page in leaves():
        mine = {(line.event, line.code) for line in lines if line.of == page.words}
        codes = {code for _, code in mine}
        wanted = {0, 2}
        if any("--model" in written for entries in page.options.values() for written, _ in entries):
            wanted.add(3)
            # Two of them end within the seconds in which one could interrupt them.
            if page.words not in ("longspec plan", "longspec export") and not any(
                event == "SIGINT" for event, _ in mine
            ):
                missing.append((page.words, "SIGINT"))
        missing += [(page.words, code) for code in sorted(wanted - codes)]
    assert missing == [], "docs/cli.md's table of every command lacks lines"


def test_every_exit_code_is_in_use() -> None:
    section = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("## Exit codes\n")[1].split("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)} == {line.code for line in table()}


def parameters() -> list[ParameterSet]:
    lines = []
    for line in table():
        marks = [pytest.mark.real] if "smollm2" in line.command else []  # the real model is there
        marks += [pytest.mark.full] if line.slow else []
        lines.append(pytest.param(line, id=str(line), marks=marks))
    return lines


@pytest.mark.parametrize("line", parameters())
def test_a_line_of_the_table(line: Line, tiny: str, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if " ./head " in line.command:
        model = open_model(tiny, dtype="fp32", device="cpu").load()
        save_head(tmp_path / "head", new_head("eagle3", model), model)
    models = tmp_path / "cache" / "longspec" / "models"
    models.parent.mkdir(parents=True)
    models.symlink_to(cache_folder() / "models")
    settings = {"LONGSPEC_MODEL": tiny, "LONGSPEC_DTYPE": "fp32", "LONGSPEC_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if not line.event and "--max-new-tokens" not in line.command:
        settings["LONGSPEC_MAX_NEW_TOKENS"] = "8"
    settings["XDG_RUNTIME_DIR"] = str(tmp_path)
    if line.inside:
        result = inside(shlex.split(line.command)[1:], tmp_path, extra=settings, cwd=tmp_path)
        assert result.code == line.code, result.err
        check_out(line.out, result.out)
        check_err(line.err, result.err)
        return
    program = line.command.replace("longspec", " ".join(forked.command()), 1)
    process = subprocess.Popen(
        ["bash", "-c", f"exec {program}"],
        cwd=tmp_path,
        env=environment(tmp_path, settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        written, told = begin(process, line, tmp_path)
        out, err = finish(process, line)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == line.code, err
    check_out(line.out, written + out)
    check_err(line.err, (told + err).decode())


def test_what_is_refused_needs_no_torch(tmp_path: Path) -> None:
    """Wrong usage is told before the library that takes two seconds to load; here it can't be loaded at all."""
    program = (
        "import json, sys; sys.modules['torch'] = None\n"
        "from longspec.cli.main import guarded\n"
        "print(json.dumps([guarded(arguments) for arguments in json.loads(sys.argv[1])]))"
    )
    wrong = [line for line in table() if line.code == 2 and not re.search("[<>]", line.command)]
    assert len(wrong) > 20
    asked = json.dumps([shlex.split(line.command)[1:] for line in wrong])
    for name in ("prompts.jsonl", "suite.jsonl"):
        (tmp_path / name).write_text(str(FILES[name]))
    done = subprocess.run(
        [sys.executable, "-c", program, asked],
        cwd=tmp_path,
        env=environment(tmp_path, {"PYTHONPATH": str(ROOT)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    codes = dict(zip(map(str, wrong), json.loads(done.stdout), strict=True))
    assert {line for line, code in codes.items() if code != 2} == LATE, done.stderr


def begin(process: subprocess.Popen[bytes], line: Line, folder: Path) -> tuple[bytes, bytes]:
    """Wait until it is at its work, and let the event come; what it had written and said by then."""
    assert process.stdout is not None
    assert process.stderr is not None
    if not line.event:
        return b"", b""
    written = told = b""
    begun = (folder / "out.jsonl", folder / "answer.txt.part")
    end = monotonic() + (SECONDS if line.shows else UNDER_WAY)
    if line.of == "longspec models":  # what it writes is written at once
        end = 0.0
    while not (written or b"/v1" in told or any(path.exists() and path.stat().st_size for path in begun)):
        if monotonic() > end:
            assert not line.shows, "it never began"
            break
        ready, _, _ = select.select([process.stdout, process.stderr], [], [], 0.05)
        if process.stdout in ready:
            written += os.read(process.stdout.fileno(), 65536)
        if process.stderr in ready:
            told += os.read(process.stderr.fileno(), 65536)
        assert process.poll() is None, told.decode()
    if line.event == "stdout closed":
        process.stdout.close()
    else:
        process.send_signal(getattr(signal, line.event))
    return written, told


def finish(process: subprocess.Popen[bytes], line: Line) -> tuple[bytes, bytes]:
    if line.event != "stdout closed":
        return process.communicate(timeout=SECONDS)
    assert process.stderr is not None
    with process.stderr:
        err = process.stderr.read()
    process.wait(SECONDS)
    return b"", err


def check_out(kind: str, out: bytes) -> None:
    text = out.decode()
    assert "\x1b" not in text
    if kind == "nothing":
        assert text == ""
    elif kind in ("text", "what was written"):
        assert text.strip()
        assert text.endswith("\n")
    elif kind == "one line":
        assert text.strip()
        assert text.index("\n") == len(text) - 1
    elif kind == "lines":
        assert text.count("\n") > 0
        assert text.endswith("\n")
    elif kind == "JSON":
        json.loads(text)
        assert text.index("\n") == len(text) - 1


def check_err(kind: str, err: str) -> None:
    assert "Traceback" not in err
    assert "\x1b" not in err
    if kind == "nothing":
        assert err == ""
    elif kind == "a sentence":
        assert re.fullmatch(r"longspec: [^\n]+\n", err), err
    else:
        assert err.endswith("\n")
