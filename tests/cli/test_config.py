"""`longspec config`: what it shows, what it refuses, and what it leaves alone in the user's file."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.commands import inside

from longspec.cli.main import guarded

OWN = """\
# mine
model = "smollm2"  # small

# why: to see the same again
seed = 1
stop = [
    "a",  # the first
]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "config" / "longspec" / "config.toml"
    made.parent.mkdir(parents=True)
    return made


def shown(home: Path, **extra: str) -> dict[str, Any]:
    result = inside(["config", "show", "--json"], home, extra=extra)
    assert (result.code, result.err) == (0, "")
    return dict(json.loads(result.out)["settings"])


def test_what_is_set_and_where_from(path: Path, tmp_path: Path) -> None:
    path.write_text('seed = 1\ntemperature = 1\nmemory = "6GiB"\napi_key = "secret"\nstop = "x"\n')
    rows = shown(tmp_path, LONGSPEC_SEED="7", LONGSPEC_QUIET="on", LONGSPEC_STATS="")
    assert rows["seed"] == {"value": 7, "from": "LONGSPEC_SEED"}
    assert rows["quiet"] == {"value": True, "from": "LONGSPEC_QUIET"}
    assert rows["stats"] == {"value": False, "from": "default"}
    assert rows["temperature"] == {"value": 1.0, "from": "config.toml"}
    assert rows["memory"] == {"value": "6GiB", "from": "config.toml"}
    assert rows["stop"] == {"value": ["x"], "from": "config.toml"}
    assert rows["model"] == {"value": "smollm2", "from": "default"}
    assert rows["top_k"] == {"value": None, "from": "default"}
    assert rows["api_key"] == {"value": "***", "from": "config.toml"}
    assert not rows.keys() & {"output", "prompt_cache", "context"}
    lines = inside(["config", "show"], tmp_path).out.decode().splitlines()
    assert "stop\t['x']\tconfig.toml".replace("'", '"') in lines
    assert "top_k\t-\tdefault" in lines
    assert len(lines) == len(rows)


def test_what_is_wrong_is_said_as_every_command_says_it(path: Path, tmp_path: Path) -> None:
    path.write_text("top_p = 3\n")
    result = inside(["config", "show"], tmp_path)
    assert (result.code, result.out) == (2, b"")
    assert f"top_p in {path}: 3 is out of range" in result.err


def test_the_path_is_printed_whatever_lies_there(path: Path, tmp_path: Path) -> None:
    assert inside(["config", "path"], tmp_path).out.decode() == f"{path}\n"
    path.write_text("not TOML")
    assert inside(["config", "path"], tmp_path).out.decode() == f"{path}\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_other_lines_stay_as_they_are(path: Path, tmp_path: Path, end: str) -> None:
    own = OWN.replace("\n", end)
    path.write_bytes(own.encode())
    path.chmod(0o640)
    assert inside(["config", "set", "model", 'a "b" \\ é'], tmp_path).code == 0
    changed = own.replace('"smollm2"', '"a \\"b\\" \\\\ é"')
    assert path.read_bytes().decode() == changed
    assert inside(["config", "set", "--max-tokens", "400"], tmp_path).code == 0
    assert path.read_bytes().decode() == changed + "max_new_tokens = 400\n"
    for name in ("max-new-tokens", "seed"):
        assert inside(["config", "unset", name], tmp_path).code == 0
    assert path.read_bytes().decode() == changed.replace(f"seed = 1{end}", "")
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in path.parent.iterdir()] == ["config.toml"]


def test_a_file_without_a_last_line_end_and_a_table_below(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path.write_text("seed = 1")
    assert guarded(["config", "set", "top-k", "5"]) == 0
    assert path.read_text() == "seed = 1\ntop_k = 5\n"
    path.write_text("seed = 1\n[run]\nseed = 2\n")
    assert guarded(["config", "set", "top-k", "5"]) == 0
    assert tomllib.loads(path.read_text()) == {"seed": 1, "top_k": 5, "run": {"seed": 2}}
    assert guarded(["config", "unset", "run"]) == 0
    assert tomllib.loads(path.read_text()) == {"seed": 1, "top_k": 5}


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "longspec.toml"
    real.parent.mkdir()
    real.write_text("seed = 1\n")
    path.symlink_to(real)
    assert inside(["config", "set", "seed", "-2"], tmp_path).code == 0
    assert path.is_symlink()
    assert real.read_text() == "seed = -2\n"


def test_a_first_setting_makes_the_file(path: Path, tmp_path: Path) -> None:
    path.parent.rmdir()
    assert inside(["config", "set", "stop", "a", "b c"], tmp_path).code == 0
    assert path.read_text() == 'stop = ["a", "b c"]\n'
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "text", "stored"),
    [
        ("temperature", "1", 1.0),
        ("time_limit", "1e-7", 1e-7),
        ("seed", "-5", -5),
        ("memory", "6GiB", "6GiB"),
        ("memory", "1000000000", 1_000_000_000),
        ("stats", "off", False),
        ("no-stream", "1", True),
        ("stop", "\n\n", ["\n\n"]),
        ("system", "Be brief.", "Be brief."),
        ("system", "7", "7"),
        ("drafter", "model+ngram", "model+ngram"),
        ("cache", "int8", "int8"),
    ],
)
def test_what_is_set_is_read_again(
    name: str, text: str, stored: object, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert guarded(["config", "set", name, text]) == 0
    [(key, value)] = tomllib.loads(path.read_text()).items()
    assert (key, value, type(value)) == (name.replace("-", "_"), stored, type(stored))
    assert guarded(["config", "show"]) == 0


REFUSED = [
    (["temperature", "warm"], "--temperature: 'warm' is not a number. See longspec run --help."),
    (["top-p", "0"], "--top-p: 0 is out of range; it must be above 0 and at most 1"),
    (["memory", "6 gigs"], "--memory: '6 gigs' is no size of memory"),
    (["port", "http"], "--port: 'http' is not a whole number. See longspec serve --help."),
    (["quiet", "maybe"], "--quiet: 'maybe' is neither yes nor no; use 1 or 0"),
    (["drafter", "wings"], "There is no drafter named 'wings'"),
    (["cache", "shoebox"], "The cache 'shoebox' is not known"),
    (["dtype", "fp7"], "The dtype 'fp7' is not known"),
    (["device", "abacus"], "The device 'abacus' is not known"),
    (["control", "hope"], "The control 'hope' is not known"),
    (["seed", "1", "2"], "seed takes one value, and 2 were given"),
    (["max_new_token", "5"], "'max_new_token' is no option that can be set; the nearest is max_new_tokens."),
    (["abacus", "5"], "longspec config show"),
    (["output", "x"], "--output belongs to one call and can't be set"),
    (["seed"], "VALUE must be given: As behind the flag"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED)
def test_what_is_refused_changes_nothing(
    arguments: list[str], said: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path.write_text("seed = 1\n")
    assert guarded(["config", "set", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert re.fullmatch(r"longspec: [^\n]+\n", err)
    assert path.read_text() == "seed = 1\n"


def test_the_flag_says_the_same(tmp_path: Path) -> None:
    flag = inside(["run", "hi", "--temperature", "warm"], tmp_path)
    setting = inside(["config", "set", "temperature", "warm"], tmp_path)
    assert (flag.code, flag.err) == (setting.code, setting.err)


def test_a_file_that_stops_other_commands_can_be_mended(path: Path, tmp_path: Path) -> None:
    path.write_text("# mine\ntemperatur = 1\n")
    refused = inside(["run", "hi"], tmp_path)
    assert refused.code == 2
    assert "sets 'temperatur', which is no option; the nearest is temperature." in refused.err
    assert inside(["config", "set", "temperature", "1"], tmp_path).code == 0
    assert inside(["config", "unset", "temperatur"], tmp_path).code == 0
    assert path.read_text() == "# mine\ntemperature = 1.0\n"
    path.write_text("seed = ")
    broken = inside(["config", "set", "seed", "1"], tmp_path)
    assert (broken.code, path.read_text()) == (2, "seed = ")
    assert f"{path} isn't TOML" in broken.err


def test_unset_of_what_is_not_set(path: Path, tmp_path: Path) -> None:
    result = inside(["config", "unset", "seed"], tmp_path)
    assert (result.code, result.err) == (0, f"longspec: seed isn't set in {path}\n")
    result = inside(["config", "unset", "seeed"], tmp_path)
    assert (result.code, "the nearest is seed." in result.err) == (2, True)
    assert not path.exists()


def test_a_variable_that_goes_before_it_is_named(path: Path, tmp_path: Path) -> None:
    result = inside(["config", "set", "seed", "1"], tmp_path, extra={"LONGSPEC_SEED": "2"})
    assert (result.code, result.err) == (0, "longspec: LONGSPEC_SEED is set too, and goes before config.toml\n")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    result = inside(["config", "set", "system", b"\xff"], tmp_path)
    assert (result.code, "isn't text" in result.err) == (2, True)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
    path.write_text("seed = 1\n")
    path.parent.chmod(0o500)
    try:
        result = inside(["config", "set", "seed", "2"], tmp_path)
    finally:
        path.parent.chmod(0o700)
    assert (result.code, path.read_text()) == (1, "seed = 1\n")
    assert "can't be written: Permission denied" in result.err
