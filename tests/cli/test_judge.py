"""The judge of shell commands: what it flags, what it leaves alone, and that no wrapping hides a danger from it."""

from __future__ import annotations

import random
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from longspec.cli.shell.danger import judge, programs
from longspec.cli.shell.explain import explained
from longspec.cli.shell.quoting import continued, substitutions
from longspec.cli.shell.usage import interpreters, language, parts

FOLDER = Path(__file__).parent


def lines(name: str, kind: str) -> list[str]:
    data: dict[str, Any] = tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))
    return [line.replace("⏎", "\n") for line in data[kind].strip("\n").splitlines()]


HARMFUL = lines("judged.toml", "harmful")
HARMLESS = lines("judged.toml", "harmless")


def test_what_harms_is_flagged() -> None:
    assert [line for line in HARMFUL if not judge(line)] == []


def test_what_does_not_harm_is_left_alone() -> None:
    assert {line: said for line in HARMLESS if (said := judge(line))} == {}


def backquoted(line: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\`$" else letter for letter in line)


DOUBLE = {ord(letter): f"\\{letter}" for letter in '\\"$`'}

# A line end is put behind the line, as it may end in a here-document or a comment.
LAYERS: dict[str, Callable[[str], str]] = {
    "sh -c": lambda line: f"sh -c {shlex.quote(line)}",
    "sh -o -c": lambda line: f"bash -eo pipefail -c {shlex.quote(line)}",
    "env": lambda line: f"env -u A B=1 sh -c {shlex.quote(line)}",
    "env -S": lambda line: f"env -iS {shlex.quote('sh -c ' + shlex.quote(line))}",
    "timeout": lambda line: f"timeout -k 5 --signal KILL 9 nice -n 5 sh -c {shlex.quote(line)}",
    "xargs": lambda line: f"ls | xargs -n 1 -I @@ bash -c {shlex.quote(line)}",
    "find": lambda line: f"find . -exec sh -c {shlex.quote(line)} _ {{}} \\;",
    "ssh": lambda line: f"ssh -p 22 host {shlex.quote(line)}",
    "eval": lambda line: f"eval {shlex.quote(line)}",
    "trap": lambda line: f"trap {shlex.quote(line)} EXIT",
    "backquotes": lambda line: f"echo `{backquoted(line)}\n`",
    "backquotes in an expansion": lambda line: f"echo ${{x:-`{backquoted(line)}\n`}}",
    "substitution": lambda line: f'echo "$(\n{line}\n)"',
    "process": lambda line: f"cat <(\n{line}\n)",
    "document": lambda line: f"sh <<'END{len(line)}'\n{line}\nEND{len(line)}",
    "document in a pipe": lambda line: f"cat <<'END{len(line)}' | bash -s a\n{line}\nEND{len(line)}",
    "string": lambda line: f"bash <<< {shlex.quote(line)}",
    "group": lambda line: f"{{ {line}\n}}",
    "subshell": lambda line: f"( {line}\n)",
    "if": lambda line: f"if true; then {line}\nfi",
    "function": lambda line: f"f() {{ {line}\n}}\nf",
    "pager": lambda line: f"PAGER={shlex.quote(line)} git log",
    "option": lambda line: f"rsync -e {shlex.quote(line)} a b",
    "git": lambda line: f"git submodule foreach {shlex.quote(line)}",
    "continuation": lambda line: f"s\\\nh \\\n-\\\nc {shlex.quote(line)}",
    "continuation in quotes": lambda line: f'sh -c "e\\\nval {shlex.quote(line).translate(DOUBLE)}"',
}


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_hides_a_danger(layer: str) -> None:
    known = [*lines("command.toml", "destructive"), *HARMFUL][list(LAYERS).index(layer) % 6 :: 6]
    assert [line for line in known if not judge(LAYERS[layer](line))] == []


def test_layers_over_layers_hide_nothing() -> None:
    draw = random.Random(20)
    known = [*lines("command.toml", "destructive"), *HARMFUL]
    missed = []
    for _ in range(200):
        line, over = draw.choice(known), draw.choices(list(LAYERS), k=draw.randint(2, 4))
        for layer in over:
            line = LAYERS[layer](line)
        if len(line) < 5000 and not judge(line):
            missed.append((over, line))
    assert missed == []


def mutated(line: str, draw: random.Random) -> str:
    """The line with a few letters dropped, doubled, exchanged or put in."""
    letters = list(line)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(letters) + 1)
        letters[at : at + draw.randint(0, 2)] = draw.choice(
            ["", "'", '"', "`", "$(", ")", "${", "}", "\\", "\n", "<<E\n", "\0"]
        )
    return "".join(letters)


def test_mutants_are_judged_without_an_error() -> None:
    draw = random.Random(21)
    for line in HARMFUL + HARMLESS:
        mutant = mutated(line, draw)
        assert all(said.isprintable() for said in judge(mutant))
        list(programs(mutant))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.sampled_from([*"rm x'\"`$(){};|&<>\\\n-=*#~!", "sh -c ", "<<E\n", "E\n", "\x1b[31m", "é", "\0", "\udcff"]),
        max_size=40,
    )
)
@example(["$'\\e]0;x\\a' y"])
@example(["`" * 1500])
@example(["$(" * 1500])
def test_any_text_is_judged(pieces: list[str]) -> None:
    assert all(said.isprintable() for said in judge("".join(pieces)))


def test_control_characters_are_not_repeated() -> None:
    for line in (
        r"$'\x1b[2J'$y x",
        r"> $'a\nb'",
        "\x1b[31m$x y",
        r"sort -o $'\e[31m' b",
        "sh -c '\x1b[31m'; $x",
        "PAGER='\x07' man a",
    ):
        said = judge(line)
        assert said, line
        assert all(each.isprintable() for each in said)
    assert all(said.isprintable() for said in explained(r"$'\x1b[2J' x"))


def test_continuations_are_joined_where_the_shell_joins_them() -> None:
    assert continued("r\\\nm x") == "rm x"
    assert continued('echo "a\\\nb" c\\\nd') == 'echo "ab" cd'
    assert continued("echo 'a\\\nb'") == "echo 'a\\\nb'"
    assert continued("ls # all \\\nrm x") == "ls # all \\\nrm x"
    assert continued("echo a\\\\\nrm x") == "echo a\\\\\nrm x"


def test_substitutions_are_found_in_plain_text() -> None:
    assert list(substitutions("a `b` $(c $(d)) $((1 + 2)) \\`e\\` `f \\`g\\``")) == ["b", "c $(d)", "f `g`"]
    assert list(substitutions("`open")) == ["open"]


def test_the_table_of_programs_is_whole() -> None:
    assert {"python3", "ruby", "node", "deno", "osascript", "sqlite3", "psql", "gdb"} <= interpreters()
    assert (language("bash"), language("psql"), language("ls")) == ("", "sql", None)
    assert parts("ls", []) == ("ls", [])
