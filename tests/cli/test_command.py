"""`longspec command`: what is flagged, what is a command at all, and what the default model makes of requests."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
import tomllib
from functools import cache
from pathlib import Path
from shutil import which
from time import time
from typing import Any

import pytest
import torch
from support.commands import inside, write_tiny
from support.engines import engine as made_engine
from support.engines import tiny
from support.real import default

from longspec.cli.shell.bash_ast import joined
from longspec.cli.shell.command_regex import form
from longspec.cli.shell.csv_columns import numbered
from longspec.cli.shell.danger import judge, programs
from longspec.cli.shell.environment import Place
from longspec.cli.shell.examples import adapted, names, template
from longspec.cli.shell.similarity import plain
from longspec.cli.shell.suggest import faults, suggest
from longspec.engine.engine import Engine
from longspec.engine.forward import Input, logits_of
from longspec.engine.scoring import score
from longspec.machine.system import cache_folder
from longspec.text.prompt import encode
from longspec.types import Draft

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
            ["bash", "-c", line], cwd=scratch(folder), env=home, capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=10,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    if "made" in asked:
        return done.returncode == 0 and all(
            (folder / name).is_file() == ("." in name) and (folder / name).exists() for name in asked["made"]
        )
    said = [each.strip().removeprefix("./").removesuffix("/") for each in done.stdout.splitlines() if each.strip()]
    if said[:1] != [asked.get("first", *said[:1])] or said[-1:] != [asked.get("last", *said[-1:])]:
        return False
    return sorted(said) in [asked["want"], asked.get("or")]


@pytest.fixture
def place() -> Place:
    """Bash with the programs of the tests, whatever this machine has."""
    return Place(
        "bash", "Linux", lambda name: f"/bin/{name}" if name in {"ls", "grep", "find", "wc", "xargs", "jq"} else None
    )


@pytest.mark.parametrize(
    ("answer", "command"),
    [
        ("ls -l", "ls -l"),
        ("$ ls -l\nIt lists files.", "ls -l"),
        ("Here you go:\n```bash\nfind . -name x \\\n  | wc -l\n```\nIt counts.", "find . -name x | wc -l"),
        ("```\nfor f in *; do\n  wc -l \"$f\"\ndone\n```", 'for f in *; do wc -l "$f"; done'),
        ("`grep x y`", "grep x y"),
        ("You can use ls -l", None),
        ("find the files that are large.", None),
        ("ls | nosuchprogram", None),
        ("find . | xargs nosuchprogram", None),
        ("ls -l |", None),
        ("echo 'open", None),
        ("ls \x1b[31m", None),
        ("ls \u202e", None),
        ("", None),
    ],
)  # fmt: skip
def test_only_a_command_is_taken_from_an_answer(place: Place, answer: str, command: str | None) -> None:
    assert place.command(answer) == command


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("cd a &&\nls", "cd a && ls"),
        ("ls |\n  wc", "ls | wc"),
        ("if true\nthen\n  ls\nfi", "if true; then ls; fi"),
        ("f() {\n ls\n}\nf", "f() { ls; }; f"),
        ("case $x in\n a) ls;;\nesac", "case $x in a) ls;; esac"),
        ("echo 'a\nb'", None),
        ("cat <<E\nx\nE", None),
        ("ls # all\npwd", None),
    ],
)
def test_lines_are_joined_where_that_is_the_same(text: str, one: str | None) -> None:
    assert joined(text) == one


def test_fish_gets_no_bash() -> None:
    fish = Place("fish", "Linux", lambda name: f"/bin/{name}" if name != "fish" else None)
    assert fish.means("ls | wc -l && echo $HOME")
    for line in ("for f in *; do ls; done", "diff <(ls) x", "echo `ls`", "echo ${x:-y}", "A=b"):
        assert not fish.means(line)


def test_examples_take_the_names_of_the_request() -> None:
    pair = ("print lines 30 to 40 of code.c", "sed -n '30,40p' code.c")
    assert adapted(pair, "lines 5 to 7 of a.txt")[1] == "sed -n '5,7p' a.txt"
    assert adapted(("find files larger than 100 MB", "find . -size +100M"), "over 2 gigabytes")[1] == "find . -size +2G"
    assert adapted(("replace cat with dog in a.txt", "sed 's/cat/dog/' a.txt"), "replace x1 with yes in b.md")[1] == (
        "sed 's/cat/yes/' b.md"
    )
    assert adapted(("find all png images", "find . -name '*.png'"), "find python files")[1] == "find . -name '*.py'"
    assert adapted(("changed this week", "find . -mtime -7"), "changed in the last 3 weeks")[1] == "find . -mtime -21"


def test_every_example_is_a_command_and_known_to_the_judge() -> None:
    everywhere = Place("bash", "Linux", lambda name: f"/bin/{name}")
    _, pairs = template()
    assert [pair for pair in pairs if not everywhere.means(pair[1])] == []
    flagged = [command for _, command in pairs if judge(command)]
    assert all(re.search(r"\brm\b|-delete|\bp?kill\b", command) for command in flagged), flagged


def bare(request: str) -> list[str]:
    """A request's words without what it names, in any order: two that have the same ask for the same."""
    said = plain(request)
    for name in sorted(names(said), key=len, reverse=True):
        said = said.replace(name, "_")
    little = {"the", "a", "an", "all", "in", "of", "and", "from", "to", "for"}
    return sorted(word for word in re.findall(r"[a-z]+|_", said.lower()) if word not in little)


def test_no_example_is_one_of_the_requests() -> None:
    shown = {tuple(bare(asked)): asked for asked, _ in template()[1]}
    held = [asked["ask"] for kind in ("requests", "more", "fresh") for asked in DATA[kind]]
    assert len(held) == len(set(held)) == 120
    assert {ask: shown[tuple(bare(ask))] for ask in held if tuple(bare(ask)) in shown} == {}


def test_faults_of_a_line() -> None:
    shown = [("search for panic in kernel.log", "grep 'panic' kernel.log")]
    assert faults("grep 'x' a.log", "lines with x in a.log", shown) == 0
    for line in (
        "grep 'x' b.log",
        "grep 'panic' a.log",
        "rm a.log",
        "cat -l -l -l -l a.log",
        "cat the a.log",
        "cat b a.log bcd",
    ):
        assert faults(line, "lines with x in a.log", shown) > 0, line


def test_columns_have_their_numbers(tmp_path: Path) -> None:
    folder = scratch(tmp_path / "scratch")
    assert numbered("rows of people.csv with an age over 35", folder) == "rows of people.csv with an column 2 over 35"
    assert numbered("the cities in people.csv", folder) == "column 3 in people.csv"
    for asked in ("the ages in other.csv", "the ages in notes.txt", "people.csv", "the ages"):
        assert numbered(asked, folder) == asked


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("files over 2gb of this week", "files over 2 GB of within 7 days"),
        ("the five largest", "the 5 largest"),
        ("one/two and two.txt", "one/two and two.txt"),
        ("the third column of x", "the column 3 of x"),
        ("changed in the last 3 hours", "changed within 180 minutes"),
    ],
)
def test_requests_in_plainer_words(asked: str, said: str) -> None:
    assert plain(asked) == said


@pytest.mark.parametrize("shell", ["bash", "sh", "fish"])
def test_the_form_of_a_command(shell: str) -> None:
    held = re.compile(form(["ls", "grep", "wc", "echo"], shell))
    for line in ("ls", "ls -l *.txt | wc -l", 'grep "a b" x.txt > y', "echo $(ls -a) 'it is' && ls\n"):
        assert held.fullmatch(line), line
    for line in (
        "list the files",
        "ls | sort",
        "ls 'open",
        "ls\nls",
        "",
        "```ls```",
        "ls; and then",
        "ls `wc`",
        "ls (all)",
    ):
        assert not held.fullmatch(line), line
    assert bool(held.fullmatch('for f in *.txt; do wc -l "$f"; done')) == (shell != "fish")


def test_every_example_has_the_form() -> None:
    _, pairs = template()
    held = re.compile(form({word.text for _, command in pairs for word in programs(command)}))
    assert [command for _, command in pairs if not held.fullmatch(command)] == []


def test_scores_are_those_of_answers_read_one_by_one(tmp_path: Path) -> None:
    one = made_engine(tiny(tmp_path))
    pairs = [("BCD", "EF"), ("BCDG", "EFE"), ("BC", "E"), ("BCD", "EF" * 60), ("BCD", "EG" * 60)]
    for (prompt, answer), said in zip(pairs, score(one, pairs), strict=True):
        vocabulary, decoder = one.model.vocabulary, one.model.decoder
        before, tokens = encode(vocabulary, prompt), vocabulary.encode(answer, add_special=False)
        session = one.open([{"role": "user", "content": prompt}])
        session.tokens += tokens
        with torch.inference_mode():
            draft = Draft.chain(session.tokens[1:])
            logits = logits_of([Input.of(session, session.tokens[:1], draft)], decoder).log_softmax(-1)
            logits = logits[len(before) - 1 : -1]
        assert said == pytest.approx(logits[range(len(tokens)), tokens].mean().item(), abs=1e-4)
    assert score(one, []) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_key_bindings_are_printed(shell: str, tmp_path: Path) -> None:
    done = inside(["command", "--init", shell], tmp_path)
    assert (done.code, done.err) == (0, "")
    assert b"longspec command --no-stdin --shell " + shell.encode() in done.out
    if program := which(shell):
        subprocess.run([program, "-n"], input=done.out, check=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "prompt is empty"),
        (["x", "--shell", "cmd.exe"], "--shell is cmd.exe"),
        (["--init", "tcsh"], "--init is tcsh"),
        (["x", "-n", "0"], "--number"),
        (["x" * 3000], "3,000 characters"),
    ],
)
def test_wrong_requests_are_said_at_once(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = inside(["command", *arguments], tmp_path)
    assert (done.code, done.out) == (2, b"")
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_model_that_babbles_gives_nothing(tmp_path: Path) -> None:
    tiny = str(write_tiny(tmp_path / "tiny"))
    done = inside(["command", "-m", tiny, "--dtype", "fp32", "--shell", "bash", "qqq"], tmp_path)
    assert (done.code, done.out) == (1, b"")
    assert re.fullmatch(r"longspec: No answer of [^\n]+ was a command [^\n]+\n", done.err), done.err


@cache
def engine() -> Engine:
    return Engine(default("auto"))


def suggested(request: str, folder: Path) -> str | None:
    """The first suggestion, held to what every one must be: a line that bash reads, of programs that are here."""
    lines = suggest(engine(), request, Place("bash", "Linux", folder=folder))
    if not lines:
        return None
    assert len(lines) == 1
    assert "\n" not in lines[0]
    subprocess.run(["bash", "-n", "-c", lines[0]], check=True, stdin=subprocess.DEVNULL)
    for word in programs(lines[0]):
        resolved = subprocess.run(["bash", "-c", 'type -- "$1"', "type", word.text], capture_output=True)
        assert resolved.returncode == 0, word.text
    return lines[0]


@pytest.mark.real
@pytest.mark.parametrize("number", [4, pytest.param(5, marks=pytest.mark.full), 28])
def test_the_default_model_does_what_is_asked(number: int, tmp_path: Path) -> None:
    asked = DATA["requests"][number]
    line = suggested(asked["ask"], scratch(tmp_path / "asked"))
    assert line is not None
    assert does(line, asked, tmp_path / "scratch")


@pytest.mark.real
def test_a_destructive_command_is_said_to_be_one(tmp_path: Path) -> None:
    pulled = {"XDG_CACHE_HOME": str(cache_folder().parent)}
    asked = ["command", "--shell", "bash", "delete the file old.log"]
    done = inside(asked, tmp_path, extra=pulled)
    assert (done.code, done.out) == (5, b"rm old.log\n")
    assert "longspec: dangerous: rm " in done.err
    done = inside([*asked, "--allow-destructive", "--explain"], tmp_path, extra=pulled)
    assert (done.code, done.out) == (0, b"rm old.log\n")
    assert "dangerous" in done.err
    assert re.search(r"^longspec: rm: ", done.err, re.MULTILINE)


@pytest.mark.real
def test_candidates_are_distinct() -> None:
    lines = suggest(engine(), "count the words in a.txt", Place("bash", "Linux"), count=3)
    assert len(lines) == len(set(lines)) > 1


@pytest.mark.full
@pytest.mark.real
@pytest.mark.parametrize("kind", ["requests", "more", "fresh"])
def test_full_every_suggestion_is_a_command(kind: str, tmp_path: Path) -> None:
    right, checked, folder = 0, 0, scratch(tmp_path / "asked")
    for number, asked in enumerate(DATA[kind]):
        line = suggested(asked["ask"], folder)
        assert line is not None, asked["ask"]
        good = None
        if "want" in asked or "made" in asked:
            checked += 1
            good = does(line, asked, tmp_path / str(number))
            right += good
        print(asked["ask"], "=>", line, "" if good is None else good)
    print(f"{right} of {checked} do what was asked")
    assert checked == 30
    assert right >= LEAST[kind]


LEAST = {"requests": 24, "more": 10, "fresh": 8}
"""Of thirty; a little below what was measured, as a near-tie may fall otherwise elsewhere."""
