"""The pages: every block of shell and Python runs, every link leads somewhere, drawings are what their script draws.

A block that a test can't run says so where it begins, with the reason: `sh no-run: installs packages`. What takes
minutes says `sh full: ...`. The others run as they stand but for the length of answers, a page's shell blocks in their
order in one fresh clone, where nothing was prepared, with the default model. A server that is up for all pages answers
most of `longspec run` at once, as it would a user's.

Every day that is done for the pages that are read first, and for what needs no model. Of the others it is only seen
that the command takes their options, since what a block shows has tests of its own; `make test-full` runs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from _pytest.mark import ParameterSet
from figures import FIGURES, FOLDER
from support import forked
from support.commands import ROOT, SECONDS

from longspec.cli.app import program
from longspec.machine.system import cache_folder

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(path for path in (ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
INFO = re.compile(r"(?P<language>sh|python|toml|json|text|)(?: (?P<kind>no-run|full): (?P<reason>\S.*))?")
EVERY_DAY = {"README.md", "docs/cli.md", "docs/install.md"}


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    kind: str  # no-run, full, or nothing
    code: str


def blocks(page: Path) -> list[Block]:
    found = []
    for fence in FENCE.finditer(page.read_text(encoding="utf-8")):
        info = INFO.fullmatch(fence["info"])
        assert info, f"{page.name}: ```{fence['info']}: write sh, python, toml, json or text; and `sh no-run: why`"
        code = re.sub(f"^{fence['indent']}", "", fence["body"], flags=re.MULTILINE)
        code = re.sub(r"(--max-new-tokens |max_(?:new_)?tokens=)\d+", r"\g<1>12", code)
        found.append(Block(page, info["language"], info["kind"] or "", code))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def having(language: str, kind: str) -> list[ParameterSet]:
    """The pages that have such blocks."""
    return [
        pytest.param(page, id=name_of(page), marks=[] if not kind and name_of(page) in EVERY_DAY else pytest.mark.full)
        for page in PAGES
        if any((block.language, block.kind) == (language, kind) for block in blocks(page))
    ]


# --- a user's machine, with a server that is up


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of somebody who has the default model, and no settings; `longspec` is this checkout's."""
    home = tmp_path_factory.mktemp("user")
    (home / "bin").mkdir()
    program = home / "bin" / "longspec"
    program.write_text(f'#!/bin/sh\nexec {" ".join(forked.command())} "$@"\n')
    program.chmod(0o755)
    editor = home / "bin" / "editor"  # of somebody who writes into a template what docs/prompts.md shows
    (template,) = (fence["body"] for fence in FENCE.finditer((ROOT / "docs" / "prompts.md").read_text())
                   if fence["body"].startswith("+++"))  # fmt: skip
    (home / "template").write_text(template)
    editor.write_text(f'#!/bin/sh\ncp "{home / "template"}" "$1"\n')
    editor.chmod(0o755)
    cache = home / "cache" / "longspec"
    cache.mkdir(parents=True)
    for name in ("models", "kernels"):  # what is dear to make again; answers and costs are the user's own
        (cache_folder() / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(cache_folder() / name)
    (home / "run").mkdir(mode=0o700)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LONGSPEC_")}
    kept.update(
        PATH=f"{home / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        XDG_CACHE_HOME=str(home / "cache"),
        XDG_CONFIG_HOME=str(home / "config"),
        XDG_STATE_HOME=str(home / "state"),
        XDG_RUNTIME_DIR=str(home / "run"),
        HF_HUB_OFFLINE="1",
        LONGSPEC_MAX_NEW_TOKENS="12",  # for what doesn't say it
        EDITOR=str(editor),
        **{f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    )
    return kept


@pytest.fixture(scope="module")
def address(user: dict[str, str]) -> Iterator[str]:
    """Of `longspec serve`, up while pages are run."""
    process = subprocess.Popen(
        [*forked.command(), "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=user,
    )
    try:
        assert process.stderr is not None
        seen = ""
        while (found := re.search(r"http://\S+(?=/v1)", seen)) is None:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        yield found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def folder(tmp_path: Path, user: dict[str, str]) -> Path:
    """Where a page's commands are given: a fresh clone."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("a fresh clone needs git, and a repository to clone")
    made = tmp_path / "longspec"
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, made], env=user, check=True)
    return made


# --- shell


def batch_did_its_work(folder: Path, out: str, err: str) -> None:
    assert out == ""
    counts = {name: len((folder / f"{name}.jsonl").read_text().splitlines()) for name in ("out", "labels", "files")}
    assert counts == {"out": 2, "labels": 2, "files": 2}
    assert "nothing is left to do" in err


def prompts_did_theirs(folder: Path, out: str, err: str) -> None:
    assert (folder / "brief.md").read_text().strip()
    assert "1\tIt broke on the first day.\t" in out


AFTERWARDS: dict[str, Callable[[Path, str, str], None]] = {
    "docs/batch.md": batch_did_its_work,
    "docs/prompts.md": prompts_did_theirs,
}


def run_shell(page: Path, kind: str, folder: Path, user: dict[str, str]) -> tuple[str, str]:
    program = "\n".join(block.code for block in blocks(page) if (block.language, block.kind) == ("sh", kind))
    if re.search(r"\bjq ", program) and shutil.which("jq") is None:
        pytest.skip("jq isn't installed")
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-x", "-c", program],
        cwd=folder,
        env=user,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


@pytest.mark.real
@pytest.mark.parametrize("page", having("sh", ""))
def test_the_commands_of_a_page(page: Path, folder: Path, user: dict[str, str], address: str) -> None:
    out, err = run_shell(page, "", folder, user)
    if check := AFTERWARDS.get(name_of(page)):
        check(folder, out, err)


@pytest.mark.real
@pytest.mark.parametrize("page", having("sh", "full"))
def test_the_commands_of_a_page_that_take_long(page: Path, folder: Path, user: dict[str, str]) -> None:
    run_shell(page, "full", folder, user)


def said_to_longspec(program: str) -> Iterator[list[str]]:
    """The arguments of every `longspec` in a shell's program."""
    lines = re.sub(r"(^|\s)#.*$", "", program, flags=re.MULTILINE)
    parts = shlex.shlex(lines, posix=True, punctuation_chars="();<>|&\n")
    parts.whitespace, parts.whitespace_split, parts.commenters = " \t\r", True, ""
    found: list[str] | None = None
    for part in [*parts, "\n"]:
        if found is not None and set(part) <= set("();<>|&\n"):
            yield found
            found = None
        elif found is not None:
            found.append(part)
        elif part == "longspec":
            found = []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_command_takes_the_options_of_a_page(page: Path) -> None:
    for block in blocks(page):
        if block.language == "sh" and not page.name.startswith("CHANGELOG"):
            for arguments in said_to_longspec(re.sub(r'"?\$\((.*)\)"?', r"; \1 ;", block.code)):
                takes(arguments)


def takes(arguments: list[str]) -> None:
    """Raises what the command would say of the options, and runs nothing."""
    command: Any = program()
    context = None
    while hasattr(command, "commands") and arguments:
        context = command.make_context("longspec", [], parent=context, resilient_parsing=True)
        if arguments[0].startswith("-"):
            break
        command = command.commands[arguments[0]]
        arguments = arguments[1:]
    command.make_context("longspec", arguments, parent=context)


# --- Python


@pytest.mark.real
@pytest.mark.parametrize("page", having("python", ""))
def test_the_python_of_a_page(
    page: Path, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, where torch is loaded; each block by itself, as a reader would paste it."""
    monkeypatch.chdir(folder)
    for block in blocks(page):
        if (block.language, block.kind) == ("python", ""):
            if "openai" in block.code:
                pytest.importorskip("openai")
            code = block.code.replace("http://127.0.0.1:8000", address)
            exec(compile(code, name_of(page), "exec"), {"__name__": "__main__"})
    assert capfd.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_written_as_data_or_python_is_that(page: Path) -> None:
    for block in blocks(page):
        if block.language == "toml":
            tomllib.loads(block.code)
        if block.language == "json":
            json.loads(block.code)
        if block.language == "python":
            compile(block.code, name_of(page), "exec")


# --- links, drawings, the site


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = [re.sub(r"[`*]", "", head).lower() for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", head).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    made_for_the_site = {"reference.md", "api.md"}
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if there.parent == ROOT / "docs" and there.name in made_for_the_site:
            continue
        assert there.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name_of(page)} links to {target}"


def test_drawings_are_what_their_script_draws() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FIGURES)
    for name, draw in FIGURES.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == draw(), f"run python docs/figures.py: {name}"


def check_recording(path: Path) -> None:
    assert path.stat().st_size < 300_000
    drawn = ElementTree.parse(path).getroot()
    texts = ["".join(text.itertext()) for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("$ longspec chat --show-drafts --stats") for text in texts)
    assert any(re.search(r"tokens per step", text) for text in texts)
    first = [
        "".join(text.itertext()) for text in drawn.iter("{http://www.w3.org/2000/svg}text") if "class" in text.attrib
    ]
    assert any(re.search(r"tokens per step", text) for text in first), "it begins with an empty screen"
    assert any("cyan" in span.get("class", "") for span in drawn.iter("{http://www.w3.org/2000/svg}tspan"))


def test_the_recording_is_one() -> None:
    check_recording(ROOT / "docs" / "recording.svg")


@pytest.mark.real
@pytest.mark.full
def test_the_recording_can_be_made_again(tmp_path: Path) -> None:
    pytest.importorskip("pyte")
    made = tmp_path / "recording.svg"
    subprocess.run([sys.executable, ROOT / "docs" / "record.py", "--output", made], check=True, timeout=600)
    check_recording(made)


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="the extra `docs` isn't installed")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--num-speculative-tokens" in (tmp_path / "reference" / "index.html").read_text()
    assert "generate_many" in (tmp_path / "api" / "index.html").read_text()


def test_the_readme_knows_where_things_are() -> None:
    """Every folder of the tree is there, and every folder with code is in the tree."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where things are\n")[1]
    named, above = set(), ""
    for indent, name in re.findall(r"^( *)([\w/]+)/ ", tree, re.MULTILINE):
        above = above if indent else name
        named.add(f"{above}/{name}" if indent else name)
    assert [name for name in named if not (ROOT / name).is_dir()] == []
    packages = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "longspec").rglob("__init__.py")}
    assert {name for name in packages if not (ROOT / name).is_symlink()} <= named
