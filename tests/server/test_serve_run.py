"""`longspec serve` as a process, and `longspec run` through it: the same bytes, codes and objects as without."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import openai
import pytest
from support.commands import SECONDS, call, environment, inside, started, write_tiny
from support.real import default
from support.servers import loads, server, until

from longspec.cli.io import server_client as remote
from longspec.cli.io.progress import Progress
from longspec.cli.options.groups import values
from longspec.cli.options.loading import Loading
from longspec.cli.shell.served import Served
from longspec.engine.answer import Answer
from longspec.engine.engine import Engine
from longspec.engine.scoring import score
from longspec.machine.system import cache_folder

TINY = ["--threads", "1", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, runtime: Path) -> Iterator[Path]:
    """A user whose runtime folder is its own."""
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("home")
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))
        for name in [name for name in os.environ if name.startswith("LONGSPEC_")]:
            patch.delenv(name)
        yield made


@pytest.fixture(scope="module")
def up(tiny: str, home: Path) -> Iterator[str]:
    """Its base URL."""
    with server(["-m", tiny, *TINY], home) as (_, url):
        yield url


def health(url: str) -> dict[str, Any]:
    with urlopen(url.removesuffix("/v1") + "/health", timeout=SECONDS) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def test_run_gets_the_same_answer_without_loading(up: str, tiny: str, home: Path) -> None:
    sampling = ["--max-new-tokens", "40", "--temperature", "0.9", "--seed", "3"]
    asked = ["run", "--no-stdin", "-m", tiny, *TINY, *sampling, "hi"]
    code, out, err, imported = loads(asked, home)
    assert (code, err, imported) == (0, "", False)
    alone = inside([*asked, "--no-server"], home)
    assert (alone.code, alone.out) == (0, out)
    objects = [json.loads(inside([*asked, "--json", *more], home).out) for more in ([], ["--no-server"])]
    for each in objects:
        assert each["timing"].pop("load_s") > 0
    assert list(objects[0]) == list(objects[1])
    assert sorted(objects[0]["timing"]) == sorted(objects[1]["timing"])
    for name in ("text", "finish_reason", "usage", "cache", "dtype", "model"):
        assert objects[0][name] == objects[1][name]


def test_run_shows_how_far_a_long_prompt_is_read() -> None:
    near, far = socket.socketpair()
    told: list[tuple[str, int, int]] = []
    progress: Any = SimpleNamespace(report=lambda *stage: told.append(stage))
    with near, far:
        source = remote.Remote(near, Path(), "name")
        for line in (b'{"read": 512, "of": 2000}\n', b'{"text": "A", "tokens": 1}\n'):
            far.sendall(line)
            source.advance(progress)
    assert told == [("reading the prompt", 512, 2000)]
    assert source.text == "A"


def test_a_chat_is_held_without_loading(up: str, tiny: str, home: Path) -> None:
    asked = ["chat", "-m", tiny, *TINY, "--temperature", "0.9", "--seed", "3", "--max-new-tokens", "12"]
    lines = b"hello\nand then?\nwhy?\n"
    alone = inside([*asked, "--no-server"], home, lines)
    done = call(asked, home, lines, {"PYTHONPROFILEIMPORTTIME": "1"}, whole=True)
    assert (done.code, done.out) == (alone.code, alone.out) == (0, alone.out)
    assert re.search(r"\| +torch$", done.err, re.MULTILINE) is None
    assert "longspec serve" in inside([*asked, "-v"], home, lines).err


def test_a_chat_goes_on_where_its_server_is_gone(tiny: str, home: Path) -> None:
    asked = ["chat", "-m", tiny, *TINY, "--strict", "--temperature", "0", "--max-new-tokens", "12"]
    alone = inside([*asked, "--no-server"], home, b"hello\nand then?\n").out.splitlines()
    up = server(["-m", tiny, *TINY, "--strict"], home)
    with up as (process, _), started(asked, home, stdin=subprocess.PIPE) as talk:
        assert talk.stdin is not None
        assert talk.stdout is not None
        talk.stdin.write(b"hello\n")
        talk.stdin.flush()
        assert talk.stdout.readline().rstrip(b"\n") == alone[0]
        process.kill()
        process.wait()
        out, err = talk.communicate(b"and then?\n", timeout=SECONDS)
    assert err.decode() == "longspec: the server takes no more questions; the model is loaded here\n"
    assert (talk.returncode, out.rstrip(b"\n")) == (0, alone[1])


def test_run_goes_on_with_a_conversation_there(up: str, tiny: str, home: Path) -> None:
    asked = ["run", "--no-stdin", "-m", tiny, *TINY, "--max-new-tokens", "12", "--temperature", "0"]
    assert inside([*asked, "--log", "hi"], home).code == 0
    code, out, err, imported = loads([*asked, "-c", "and?"], home)
    assert (code, err, imported) == (0, "", False)
    (home / "state" / "longspec" / "log.db").unlink()
    assert inside([*asked, "--no-server", "--log", "hi"], home).code == 0
    assert inside([*asked, "--no-server", "-c", "and?"], home).out == out


def test_a_held_answer_is_written_there(up: str, tiny: str, home: Path) -> None:
    (home / "schema.json").write_text('{"enum": ["yes", "no"]}')
    asked = ["run", "--no-stdin", "-m", tiny, *TINY, "--max-new-tokens", "12"]
    for held in (["--regex", "[a-c]{4}"], ["--json-schema", str(home / "schema.json")]):
        code, out, err, imported = loads([*asked, *held, "hi"], home)
        assert (code, err, imported) == (0, "", False)
        assert inside([*asked, *held, "--no-server", "hi"], home).out == out


def test_scores_and_samples_of_a_server_are_the_engines(
    up: str, tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(home).items():  # which a server's address is made of
        monkeypatch.setenv(name, value)
    made, progress = Engine.load(tiny, dtype="fp32", threads=1), Progress(tiny, quiet=True)
    asks: Any = [([{"role": "user", "content": text}], {"max_new_tokens": 6, "temperature": 0.9}) for text in "ab"]
    pairs = [([{"role": "user", "content": "a"}], "AbC"), ([{"role": "user", "content": "ab"}], "C")]
    left_out: Any = Loading
    loading = {**values(left_out()), "draft_from": (), "dtype": "fp32", "threads": 1}
    path = remote.found(tiny, {name: loading[name] for name in loading if name != "model"}, {})
    assert path is not None
    served = Served(path, progress)
    assert served.scores(pairs) == pytest.approx(score(made, [*pairs]), abs=1e-5)
    told = {number: answer.text for number, answer in served.generate_many(asks, 2)}
    alone = dict(made.generate_many(asks))
    assert told == {number: answer.text for number, answer in alone.items() if isinstance(answer, Answer)}
    with pytest.raises(remote.GoneError):
        Served(path.with_name("none"), progress).scores(pairs)


def test_run_reports_errors_in_the_same_way(up: str, tiny: str, home: Path) -> None:
    asked = ["run", "--no-stdin", "-m", tiny, *TINY, "--max-new-tokens", "300000", "hi"]
    code, out, err, imported = loads(asked, home)
    alone = inside([*asked, "--no-server"], home)
    assert not imported
    assert (code, out, err) == (alone.code, alone.out, alone.err)
    assert code == 2


def test_other_settings_are_not_answered(up: str, tiny: str, home: Path) -> None:
    asked = ["run", "--no-stdin", "-m", tiny, *TINY, "--max-new-tokens", "2", "hi"]
    for more in (["--drafter", "none"], ["--memory", "4GiB"]):
        assert loads([*asked, *more], home)[3]


def test_texts_to_draft_from(tiny: str, home: Path) -> None:
    text = home / "text"
    text.write_text("hi there")
    more = ["-m", tiny, *TINY, "--draft-from", str(text)]
    with server(more, home):
        asked = ["run", "--no-stdin", *more, "--max-new-tokens", "20", "hi"]
        code, out, err, imported = loads(asked, home)
        assert (code, err, imported) == (0, "", False)
        assert inside([*asked, "--no-server"], home).out == out


def test_a_server_with_a_memory_budget(tmp_path: Path, home: Path) -> None:
    small = str(write_tiny(tmp_path, context=1000))
    refused = call(["serve", "--port", "0", "-m", small, *TINY, "--memory", "50MiB"], home, whole=True)
    assert (refused.code, refused.out) == (4, b"")
    assert "The memory budget is 50 MiB" in refused.err
    with server(["-m", small, *TINY, "--memory", "4GiB"], home, whole=True) as (process, url):
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            whole = client.completions.create(model=small, prompt="A", max_tokens=5)
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 5
        assert loads(["run", "--no-stdin", "-m", small, *TINY, "--max-new-tokens", "2", "hi"], home)[3]
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_signal_keeps_what_was_written(up: str, tiny: str, home: Path, more: list[str]) -> None:
    until(lambda: not health(up)["texts"])
    with started(["run", "--no-stdin", "-m", tiny, *TINY, *more, "hi"], home) as process:
        assert process.stdout is not None
        if more:
            until(lambda: bool(health(up)["texts"]))
            with openai.OpenAI(base_url=up, api_key="none", max_retries=0) as client:  # whose turn comes after it
                client.completions.create(model=tiny, prompt="A", max_tokens=1)
        else:
            os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (130, b"")
    assert out.endswith(b"\n")
    if more:
        assert json.loads(out)["finish_reason"] == "interrupted"


def test_a_closed_pipe_frees_the_session(up: str, tiny: str, home: Path) -> None:
    with started(["run", "--no-stdin", "-m", tiny, *TINY, "hi"], home) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        assert process.wait(SECONDS) == 141
    until(lambda: not health(up)["texts"])


def test_a_server_that_breaks_off_is_told(tiny: str, home: Path) -> None:
    with server(["-m", tiny, *TINY, "--strict"], home) as (process, _):
        asked = ["run", "--no-stdin", "-m", tiny, *TINY, "--strict", "hi"]
        with started(asked, home) as running:
            assert running.stdout is not None
            first = os.read(running.stdout.fileno(), 1)
            process.kill()
            out, err = running.communicate(timeout=SECONDS)
        assert running.returncode == 1
        assert err == b"longspec: The server broke off before the answer's end; ask again, or with --no-server.\n"
        assert (first + out).endswith(b"\n")
    assert inside([*asked, "--max-new-tokens", "1"], home).code == 0  # the dead socket is nobody's


def test_sigterm_ends_it_with_code_0(tiny: str, home: Path) -> None:
    with server(["-m", tiny, *TINY, "--drafter", "none"], home) as (process, url):
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            chunks = iter(client.completions.create(model=tiny, prompt="A", max_tokens=100_000, stream=True))
            next(chunks)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)  # at once, with what they have
            assert list(chunks)[-1].choices[0].finish_reason == "length"
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out, err) == (0, "", "")


def test_others_need_a_key(home: Path) -> None:
    done = inside(["serve", "--host", "0.0.0.0"], home)
    assert (done.code, done.out) == (2, b"")
    assert "set LONGSPEC_API_KEY" in done.err


def test_a_folder_that_others_read_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        assert remote.folder() is None
        assert remote.folder(make=True) == Path(folder, "longspec")
        Path(folder, "longspec").chmod(0o755)
        assert remote.folder(make=True) is None


def test_a_socket_is_named_after_model_and_settings(tiny: str, tmp_path: Path) -> None:
    first = remote.address(tmp_path, tiny, {"cache": "dense", "threads": None})
    assert first == remote.address(tmp_path, os.path.relpath(tiny), {"cache": "dense", "all_rows": False})
    assert first != remote.address(tmp_path, tiny, {"cache": "int8"})
    os.utime(Path(tiny) / "config.json")
    assert first != remote.address(tmp_path, tiny, {"cache": "dense"})


@pytest.mark.real
def test_the_default_model(home: Path) -> None:
    alone = Engine(default("auto")).generate("Why is the sky blue?", max_new_tokens=24)
    pulled = {"XDG_CACHE_HOME": str(cache_folder().parent)}
    with server([], home, pulled) as (_, url), openai.OpenAI(base_url=url, api_key="none") as client:
        asked = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "Why is the sky blue?"}], max_tokens=24
        )
        assert asked.choices[0].message.content == alone.text
        run = ["run", "--no-stdin", "--max-new-tokens", "24", "Why is the sky blue?"]
        code, out, _, imported = loads(run, home, pulled)
        assert (code, out.decode(), imported) == (0, alone.text + "\n", False)
        line = ["command", "--shell", "bash", "count the lines in notes.txt"]
        code, out, _, imported = loads(line, home, pulled)
        assert (code, imported) == (0, False)
        assert inside([*line, "--no-server"], home, extra=pulled).out == out
