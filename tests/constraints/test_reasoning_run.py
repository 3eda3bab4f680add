"""Reasoning as the command and the server tell it: hidden, apart, bounded; what can't be done is refused."""

from __future__ import annotations

import json
import os
import pty
from pathlib import Path
from typing import Any

import pytest
from support.commands import Terminal, inside, started, write_tiny
from support.servers import loads, server, serving
from support.thoughts import LEVELLED, OPENS, vocabulary

from longspec.cli.main import guarded
from longspec.engine.engine import Engine

TINY = ["--threads", "1", "--dtype", "fp32"]
BOUND = ["--max-new-tokens", "40", "--reasoning-budget", "12"]


def write_thinking(folder: Path, template: str = OPENS) -> str:
    """A checkpoint that thinks until it is told to stop."""
    write_tiny(folder)
    vocabulary(None).tokenizer.save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<s>", "pad_token": "<pad>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return str(folder)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_thinking(tmp_path_factory.mktemp("thinker"))


def run(model: str, capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert guarded(["run", "--no-stdin", "--no-server", "-m", model, *TINY, *arguments]) == code
    return capfd.readouterr()


def test_reasoning_stands_apart(thinker: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(run(thinker, capfd, "hi", *BOUND, "--json")[0])
    assert answer["usage"]["reasoning_tokens"] == 12
    assert 0 < len(answer["reasoning"]) <= 12
    assert 20 < len(answer["text"]) <= 27
    whole, _ = run(thinker, capfd, "hi", *BOUND)
    assert whole.rstrip("\n").endswith("</think>" + answer["text"])
    assert answer["reasoning"] in whole
    hidden = run(thinker, capfd, "hi", *BOUND, "--hide-reasoning")
    assert hidden == (answer["text"].rstrip("\n") + "\n", "")
    assert run(thinker, capfd, "hi", *BOUND, "--hide-reasoning", "--no-stream") == hidden
    assert "(12 of reasoning)" in run(thinker, capfd, "hi", *BOUND, "--stats")[1]


def test_an_answer_that_is_all_thought_is_explained(
    thinker: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, err = run(thinker, capfd, "hi", "--max-new-tokens", "9", "--hide-reasoning")
    assert (out, "--reasoning-budget" in err, err.count("\n")) == ("", True, 1)
    assert run(thinker, capfd, "hi", "--max-new-tokens", "9", "--hide-reasoning", "-q") == ("", "")


def test_a_terminal_sees_that_it_thinks(thinker: str, home: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ["run", "--no-stdin", "hi", "-m", thinker, *TINY, "--max-new-tokens", "900", "--hide-reasoning"]
    with started([*arguments, "--reasoning-budget", "700"], home, stderr=theirs) as process:
        os.close(theirs)
        seen = Terminal(ours).until("thinking… ".encode())
        assert process.stdout is not None
        out = process.stdout.read()
        seen += Terminal(ours).until(None)
    os.close(ours)
    assert b"</think>" not in out
    assert len(out) > 150
    drawn = seen[seen.index("thinking… ".encode()) :]
    assert b"%" not in drawn  # nobody knows how long it will think
    assert seen.rstrip().endswith((b"\x1b[2K", b"\x1b[?25h"))  # what was drawn is gone


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--effort", "lots"], "none, low, medium, high"),
        (["--effort", "low"], "knows no effort"),
        (["--reasoning-budget", "-1"], "0 or more"),
        (["--raw", "--reasoning-budget", "3"], "leave one out"),
        (["--raw", "--effort", "low"], "leave one out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], said: str, thinker: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, err = run(thinker, capfd, "hi", *arguments, code=2)
    assert (out, said in err, err.count("\n")) == ("", True, 1)


def test_a_flag_goes_before_a_setting(
    thinker: str, home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGSPEC_REASONING_BUDGET", "5")
    monkeypatch.setenv("LONGSPEC_HIDE_REASONING", "1")
    shown, _ = run(thinker, capfd, "hi", "--max-new-tokens", "20", "--no-hide-reasoning")
    assert shown.index("</think>") == 5
    assert "</think>" not in run(thinker, capfd, "hi", "--max-new-tokens", "20", "--raw")[0]


def test_an_effort_reaches_the_template(tmp_path: Path, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_thinking(tmp_path / "levelled", LEVELLED)
    counts = [
        json.loads(run(model, capfd, "hi", "--max-new-tokens", "2", "--json", "--effort", effort)[0])["usage"]
        for effort in ("low", "medium")
    ]
    assert counts[1]["prompt_tokens"] - counts[0]["prompt_tokens"] == len("medium") - len("low")


def test_lines_and_chats_hide_it_too(thinker: str, home: Path) -> None:
    asked = ["-m", thinker, *TINY, *BOUND, "--hide-reasoning"]
    alone = inside(["run", "--no-stdin", *asked, "hi"], home)
    lines = inside(["run", "--each-line", *asked], home, b"hi\n")
    assert (alone.code, lines.code) == (0, 0)
    assert lines.out.decode() == " ".join(alone.out.decode().split("\n")).strip() + "\n"
    chat = inside(["chat", *asked], home, b"hi\nand?\n")
    assert (chat.code, chat.err) == (0, "")
    assert chat.out.startswith(alone.out)
    assert b"</think>" not in chat.out


def test_a_batch_tells_it_apart(thinker: str, home: Path) -> None:
    source, out = home / "in.jsonl", home / "out.jsonl"
    records: list[dict[str, Any]] = [
        {"id": "a", "prompt": "hi"},
        {"id": "b", "prompt": "hi", "reasoning_budget": 3},
        {"id": "c", "prompt": "hi", "raw": True},
        {"id": "d", "prompt": "hi", "effort": "low"},
    ]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = ["batch", str(source), "-o", str(out), "-m", thinker, *TINY, *BOUND, "--stop-loops"]
    assert guarded(asked) == 1
    found = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert [found[name]["usage"]["reasoning_tokens"] for name in "abc"] == [12, 3, 0]
    assert found["c"]["reasoning"] is None
    assert found["b"]["text"]
    assert found["d"]["error"]["code"] == "invalid_request"


def test_openais_format_has_a_field_for_it(thinker: str, home: Path) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 30, "reasoning_budget": 4}
    line = {"custom_id": "a", "url": "/v1/chat/completions", "method": "POST", "body": body}
    (home / "in.jsonl").write_text(json.dumps(line) + "\n")
    assert guarded(["batch", f"{home}/in.jsonl", "-o", f"{home}/out.jsonl", "-m", thinker, *TINY]) == 0
    answer = json.loads((home / "out.jsonl").read_text())["response"]["body"]
    assert set(answer["choices"][0]["message"]) == {"role", "content", "refusal", "reasoning_content"}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


@pytest.fixture(scope="module")
def made(thinker: str) -> Engine:
    return Engine.load(thinker, dtype="fp32")


def test_the_server_tells_it_apart(made: Engine) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "seed": 1}
    with serving(made) as served, served.client() as client:
        more = {"reasoning_budget": 12, "stop_loops": True}
        whole = client.chat.completions.create(model="tiny", **asked, extra_body=more)
        message = whole.choices[0].message
        alone = made.generate("hi", max_new_tokens=40, reasoning_budget=12, seed=1)
        assert (message.reasoning_content, message.content) == (alone.reasoning, alone.text)
        assert whole.usage is not None
        assert whole.usage.completion_tokens_details is not None
        assert whole.usage.completion_tokens_details.reasoning_tokens == 12
        pieces = [
            chunk.choices[0].delta
            for chunk in client.chat.completions.create(model="tiny", **asked, stream=True, extra_body=more)
        ]
        assert "".join(getattr(piece, "reasoning_content", None) or "" for piece in pieces) == alone.reasoning
        assert "".join(piece.content or "" for piece in pieces) == alone.text
        completion = client.completions.create(model="tiny", prompt="a<think>\n", max_tokens=20, seed=1)
        raw = made.generate("a<think>\n", raw=True, max_new_tokens=20, seed=1)
        assert completion.choices[0].text == raw.text
        status, said = served.ask({**asked, "reasoning_effort": "low"}, "/v1/chat/completions")
        assert (status, "knows no effort" in said["error"]["message"]) == (400, True)
        status, said = served.ask({"prompt": "a", "reasoning_budget": 3})
        assert (status, said["error"]["param"]) == (400, "reasoning_budget")


def test_run_hides_what_a_server_thought(
    thinker: str, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    for name in [name for name in os.environ if name.startswith("LONGSPEC_")]:
        monkeypatch.delenv(name)
    asked = ["run", "--no-stdin", "-m", thinker, *TINY, *BOUND, "--stop-loops", "hi"]
    with server(["-m", thinker, *TINY], tmp_path):
        for more in ([], ["--hide-reasoning"], ["--hide-reasoning", "--no-stream"]):
            code, out, err, imported = loads([*asked, *more], tmp_path)
            assert (code, err, imported) == (0, "", False)
            assert out == inside([*asked, *more, "--no-server"], tmp_path).out
