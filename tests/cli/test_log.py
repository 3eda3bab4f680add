"""The log of answers, and what a hand types without having read the help."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from support.commands import inside, write_tiny

from longspec.cache import CACHES
from longspec.cli.app import SUMMARIES, program
from longspec.cli.io import log
from longspec.cli.options import loading, typer_classes
from longspec.control import CONTROLS
from longspec.drafters import DRAFTERS
from longspec.errors import LongspecError
from longspec.memory.choices import WEIGHTS
from longspec.model.load import DTYPES

TINY = ["--dtype", "fp32", "--temperature", "0", "--max-new-tokens", "12", "--no-stdin", "--no-server"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("checkpoint")))


def test_a_conversation_in_the_log(tiny: str, tmp_path: Path) -> None:
    where = {"XDG_STATE_HOME": str(tmp_path / "state")}

    def call(*arguments: str, code: int = 0) -> str:
        done = inside(arguments, tmp_path, extra=where)
        assert done.code == code, done.err
        return done.out.decode()

    call("run", "-c", "on", "-m", tiny, *TINY, code=2)
    assert call("logs") == ""
    first = call("run", "one", "-m", tiny, *TINY)
    assert call("logs") == ""  # nothing is kept unasked
    assert call("run", "one", "--log", "-s", "Be", "-m", tiny, *TINY) != first
    second = call("run", "-c", "two", "-m", tiny, *TINY)
    rows = [json.loads(line) for line in call("logs", "--json").splitlines()]
    assert [(row["prompt"], row["system"], row["conversation"]) for row in rows] == [("one", "Be", 1), ("two", "Be", 1)]
    assert rows[1]["answer"] == second.rstrip("\n")
    assert second != call("run", "two", "-s", "Be", "-m", tiny, *TINY)  # what was said before counts
    assert "> two\n" in call("logs", "-n", "1")
    assert "> one\n" not in call("logs", "two")
    assert call("logs", "100%") == ""
    assert stat.S_IMODE((tmp_path / "state" / "longspec" / "log.db").stat().st_mode) == 0o600


def test_a_log_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "longspec").mkdir()
    log.path().write_bytes(b"not a database" * 100)
    with pytest.raises(LongspecError, match="can't be used"):
        log.entries(3)


def test_what_a_hand_types(tiny: str, tmp_path: Path) -> None:
    def out(*arguments: str) -> str:
        done = inside(arguments, tmp_path)
        assert done.code == 0, done.err
        return done.out.decode()

    assert out("help") == out("--help") == out()
    assert out("help", "pull") == out("pull", "--help")
    assert out("version") == out("--version")
    assert out("ls") == out("models")
    assert out("Why is it so?", "-m", tiny, *TINY) == out("run", "Why is it so?", "-m", tiny, *TINY)
    few, all_of_them = out("run", "--help"), out("run", "--help-all")
    assert "--temperature" in few
    assert "--min-p" not in few
    assert "--min-p" in all_of_them
    assert few.count("\n  -") <= 15


def test_what_the_short_help_shows_is_there() -> None:
    for command, names in typer_classes._OFTEN.items():
        assert {*names.split()} <= {parameter.name for parameter in program().commands[command].params}, command


def test_the_help_says_what_the_commands_say() -> None:
    for name, command in program().commands.items():
        assert " ".join((command.help or "").split("\n\n")[0].split()) == SUMMARIES[name]


def test_what_a_shell_offers_is_what_there_is() -> None:
    assert {*loading.DRAFTERS} == {"auto", "recycle+ngram", *DRAFTERS}
    assert {*loading.CACHES} == {"auto", *(name for name in CACHES if " " not in name)}
    assert {*loading.DTYPES} == {"auto", *DTYPES}
    assert {*loading.CONTROLS} == {*CONTROLS}
    assert {*loading.WEIGHTS} == {*WEIGHTS}
    assert "qwen3-4b" in loading.models("qwen3-4")


def test_a_shell_gets_values(tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        words = {
            "COMP_WORDS": "longspec run --drafter rec",
            "COMP_CWORD": "3",
            "_TYPER_COMPLETE_ARGS": "longspec run --drafter rec",
        }
        extra = {"_LONGSPEC_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args", **words}
        assert "recycle" in inside([], tmp_path, extra=extra).out.decode(), shell
