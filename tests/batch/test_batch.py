"""`longspec batch` as a user has it: resumed after every kind of end, every id once, one process at a time."""

from __future__ import annotations

import fcntl
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.commands import COMMAND, ROOT, SECONDS, environment, started

from longspec.cli.main import guarded

SETTINGS = ["--threads", "1", "--dtype", "fp32", "--max-new-tokens", "12"]


def prompts(path: Path, count: int, times: int = 1, **options: Any) -> Path:
    """times: how often a prompt says the same."""
    texts = [f"Line {i * 7919 % 997} of {i % 13}." * times for i in range(count)]
    lines = [{"id": f"n{i}", "prompt": text, **options} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def batch(tiny: str, source: Path, out: Path, *more: str) -> int:
    return guarded(["batch", str(source), "-o", str(out), "-m", tiny, *SETTINGS, *more])


def lines(out: Path) -> list[dict[str, Any]]:
    data = out.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def answers(out: Path) -> dict[Any, str]:
    read = lines(out)
    assert len({line["id"] for line in read}) == len(read)
    return {line["id"]: line["text"] for line in read}


def test_special_tokens_are_a_lines_own_choice(tiny: str, home: Path) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": "<s>" * 9, "allow_special_tokens": allowed} for allowed in (False, True)
    ]
    records.append({"messages": [{"role": "user", "content": "<s>" * 9, "tokens": [1, 1]}]})
    (home / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert batch(tiny, home / "in.jsonl", home / "out.jsonl", "--in-order") == 0
    assert [line["usage"]["prompt_tokens"] for line in lines(home / "out.jsonl")] == [29, 11, 29]
    assert batch(tiny, home / "in.jsonl", home / "all.jsonl", "--in-order", "--allow-special-tokens") == 0
    assert [line["usage"]["prompt_tokens"] for line in lines(home / "all.jsonl")] == [29, 11, 11]


def test_every_line_is_the_object_of_run_with_its_id(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = prompts(home / "in.jsonl", 20), home / "out.jsonl"
    wrong = ["broken", '{"id": "n3", "prompt": "again"}', '{"prompt": "x", "max_new_tokens": 0}']
    source.write_text(source.read_text() + "\n".join(wrong))
    assert batch(tiny, source, out, "--summary", str(home / "sum.json"), "--drafter", "ngram") == 1
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert "20 written, 3 failed" in stderr
    read = lines(out)
    assert sorted(line["index"] for line in read) == list(range(23))
    failed = {line["index"]: line["error"]["code"] for line in read if "error" in line}
    assert failed == {20: "invalid_line", 21: "duplicate_id", 22: "invalid_request"}
    assert guarded(["run", "--no-stdin", "--json", "-m", tiny, *SETTINGS, "Line 0 of 0."]) == 0
    alone = json.loads(capfd.readouterr().out)
    first = next(line for line in read if line["index"] == 0)
    assert list(first) == ["id", "index", *alone]
    assert first["text"] == alone["text"]
    summary = json.loads((home / "sum.json").read_text())
    assert (summary["written"], summary["failed"], summary["complete"]) == (20, 3, True)
    before = out.read_bytes()
    assert batch(tiny, source, out) == 1  # the errors stand
    assert out.read_bytes() == before
    assert "nothing is left to do" in capfd.readouterr().err
    assert batch(tiny, source, out, "--retry-errors") == 1
    assert sorted(line["index"] for line in lines(out)) == list(range(23))


def test_answers_depend_on_ids_not_on_places_or_companions(tiny: str, home: Path) -> None:
    sampled = ["--temperature", "0.9", "--seed", "3"]
    source = prompts(home / "in.jsonl", 9)
    assert batch(tiny, source, home / "a", *sampled) == 0
    turned = home / "turned.jsonl"
    turned.write_text("".join(reversed(source.read_text().splitlines(keepends=True))))
    assert batch(tiny, turned, home / "b", *sampled, "--batch-size", "2", "--drafter", "none") == 0
    assert answers(home / "a") == answers(home / "b")
    assert len(set(answers(home / "a").values())) == 9


def test_in_order(tiny: str, home: Path) -> None:
    source, out = home / "in.jsonl", home / "out"
    asked = [{"prompt": f"n {i}", "max_new_tokens": 1 + i * 37 % 30} for i in range(40)]
    source.write_text("".join(json.dumps(line) + "\n" for line in asked))
    assert batch(tiny, source, out, "--in-order", "--batch-size", "3") == 0
    assert [line["index"] for line in lines(out)] == list(range(40))
    assert batch(tiny, source, home / "free", "--batch-size", "3") == 0
    assert [line["index"] for line in lines(home / "free")] != list(range(40))
    assert answers(home / "free") == answers(out)


def test_openai_in_openai_out(tiny: str, home: Path) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    asked = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi", "max_tokens": 3}},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {**chat, "n": 2}},
    ]
    source, out = home / "in.jsonl", home / "out"
    source.write_text("\n".join(map(json.dumps, asked)))
    assert batch(tiny, source, out) == 1
    a, b, c = sorted(lines(out), key=lambda line: str(line["custom_id"]))
    assert a["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert a["response"]["body"]["usage"]["completion_tokens"] == 4
    assert b["response"]["body"]["object"] == "text_completion"
    assert b["response"]["body"]["usage"]["completion_tokens"] == 3
    assert (c["response"], c["error"]["code"]) == (None, "invalid_line")
    before = out.read_bytes()
    assert batch(tiny, source, out) == 1
    assert out.read_bytes() == before


def test_a_torn_line_is_cut_and_written_again(tiny: str, home: Path) -> None:
    source, out = prompts(home / "in.jsonl", 8), home / "out"
    assert batch(tiny, source, out) == 0
    whole, data = answers(out), out.read_bytes()
    for end in (len(data) - 1, len(data) - 40, data.index(b"\n") + 2, 5):
        out.write_bytes(data[:end])
        assert batch(tiny, source, out) == 0
        assert answers(out) == whole


def test_other_settings_are_refused(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = prompts(home / "in.jsonl", 3), home / "out"
    assert batch(tiny, source, out, "--limit", "2") == 0
    before = out.read_bytes()
    others = {"another seed": ["--seed", "5"], "another order": ["--in-order"], "another strictness": ["--strict"]}
    for said, more in others.items():
        assert batch(tiny, source, out, *more) == 2
        assert said in capfd.readouterr().err
    prompts(source, 4)
    assert batch(tiny, source, out) == 2
    assert "another input" in capfd.readouterr().err
    assert out.read_bytes() == before
    assert batch(tiny, source, out, "--continue-anyway") == 0
    assert len(answers(out)) == 4
    assert json.loads((home / "out.meta.json").read_text())["mixed"] is True


def test_what_is_not_ours_is_left_alone(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = prompts(home / "in.jsonl", 3), home / "out"
    out.write_text("a letter\nto keep")
    for more, said in (([], "doesn't say what it was made from"), (["--continue-anyway"], "Line 1 of")):
        assert batch(tiny, source, out, *more) == 2
        assert said in capfd.readouterr().err
        assert out.read_text() == "a letter\nto keep"
    for path, said in ((source, "is the output too"), (home, "isn't a file"), (Path("/dev/full"), "isn't a file")):
        assert batch(tiny, source, path) == 2
        assert said in capfd.readouterr().err


def test_one_process_at_a_time(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = prompts(home / "in.jsonl", 3), home / "out"
    with out.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert batch(tiny, source, out) == 2
    assert "Another process is writing" in capfd.readouterr().err
    assert batch(tiny, source, out) == 0


def test_too_many_errors(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (home / "in.jsonl").write_text("broken\n" * 9)
    assert batch(tiny, home / "in.jsonl", home / "out", "--max-errors", "2") == 1
    assert "3 lines failed, and --max-errors is 2" in capfd.readouterr().err
    assert len(lines(home / "out")) == 3


@pytest.mark.parametrize("more", [[], ["--in-order"]])
def test_a_text_that_breaks_its_pass_breaks_no_other(
    tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    from longspec.engine.engine import Engine

    source = prompts(home / "in.jsonl", 12)
    assert batch(tiny, source, home / "whole", *more) == 0
    step = Engine.step

    def failing(self: Engine, sessions: Sequence[Any], *rest: Any) -> Any:
        if any(session.key == "n3" and len(session.answer) > 4 for session in sessions):
            raise RuntimeError("the third is heavy")
        return step(self, sessions, *rest)

    monkeypatch.setattr(Engine, "step", failing)
    assert batch(tiny, source, home / "out", *more) == 1
    read = {line["id"]: line.get("text", line.get("error")) for line in lines(home / "out")}
    assert read.pop("n3") == {
        "code": "failed",
        "message": "The text could not be written: RuntimeError: the third is heavy.",
    }
    whole = answers(home / "whole")
    assert read == {name: text for name, text in whole.items() if name != "n3"}
    assert batch(tiny, source, home / "out", *more) in (0, 1)  # a second run ends: the error stands in the output
    assert len(lines(home / "out")) == 12


def test_memory_is_planned_for_all_texts_of_a_pass(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = prompts(home / "in.jsonl", 3)
    assert batch(tiny, source, home / "out", "--memory", "4GiB", "--batch-size", "2") == 0
    assert "in each of 2 texts" in capfd.readouterr().err
    assert batch(tiny, source, home / "fewer", "--memory", "4GiB", "--batch-size", "4096") == 0
    assert re.search(r"in each of (\d+) texts: cache dense.*, \1 of 4,096 texts side by side", capfd.readouterr().err)
    assert answers(home / "fewer") == answers(home / "out")
    assert batch(tiny, source, home / "small", "--memory", "1MiB", "--batch-size", "2") == 4
    assert "tokens need at least" in capfd.readouterr().err


# --- ends that nobody asked for


def kill_and_resume(tiny: str, home: Path, count: int, kills: int, seed: int, *more: str, times: int = 1) -> None:
    source, out = prompts(home / "in.jsonl", count, times), home / "out"
    more = (*more, "--temperature", "1")
    assert batch(tiny, source, home / "whole", *more) == 0
    arguments = ["batch", str(source), "-o", str(out), "-m", tiny, *SETTINGS, *more, "-q"]
    generator, lived = random.Random(seed), 0
    for _ in range(kills):
        with started(arguments, home) as process:
            begun = out.stat().st_size if out.exists() else 0
            end = time.monotonic() + SECONDS
            while process.poll() is None and (not out.exists() or out.stat().st_size == begun):
                assert time.monotonic() < end
                time.sleep(0.001)
            time.sleep(generator.random() * 0.05)
            lived += process.poll() is None
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.read()  # its end: nobody writes any more
    assert lived, "every run had ended before it was killed"
    assert batch(tiny, source, out, *more) == 0
    assert answers(out) == answers(home / "whole")


def test_killed_four_times(tiny: str, home: Path) -> None:
    kill_and_resume(tiny, home, count=60, kills=4, seed=1)


@pytest.mark.full
def test_killed_twenty_times(tiny: str, home: Path) -> None:
    kill_and_resume(tiny, home, count=600, kills=20, seed=2)


@pytest.mark.full
def test_killed_twenty_times_while_it_speculates_over_codes(tiny: str, home: Path) -> None:
    """Prompts of three blocks, of which codes of four bits are read, and which repeat themselves for the drafter."""
    speculating = ["--drafter", "ngram", "--control", "fixed", "--cache", "int4"]
    kill_and_resume(tiny, home, 300, 20, 3, *speculating, times=15)
    for line in lines(home / "out"):
        assert line["cache"] == "int4"
        assert line["usage"]["prompt_tokens"] > 3 * 64 - 20
    assert sum(line["speculation"]["accepted"] for line in lines(home / "out")) > 0


def test_no_file_is_two_things_at_once(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is read, what is written and what lies beside it are compared before anything is written."""
    source, out = prompts(home / "in.jsonl", 2), home / "out"
    (home / "link.jsonl").symlink_to(source)
    (home / "hard.jsonl").hardlink_to(source)
    (home / "set.json").write_text("{}")
    before = {path: path.read_bytes() for path in (source, home / "set.json")}
    wrong: list[tuple[list[str], str]] = [
        (["--summary", str(source)], "is the summary too"),
        (["--summary", str(home / "link.jsonl")], "is the summary too"),
        (["--summary", str(home / "hard.jsonl")], "is the summary too"),
        (["--summary", f"{home}/./out.meta.json"], "is the output's record too"),
        (["--summary", f"{out}"], "is the output too"),
        (["--summary", f"{out}.tmp"], "is its copy too"),
        (["--summary", str(home / "set.json"), "--skip-set", str(home / "set.json")], "is the summary too"),
    ]
    for more, said in wrong:
        assert batch(tiny, source, out, *more) == 2
        assert said in capfd.readouterr().err
    listed = home / "out.meta.json"
    assert guarded(["batch", "--files-from", str(listed), "-o", str(out), "-m", tiny]) == 2
    assert "is the output's record too" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in home.glob("out*")) == []
    others = {
        "is the output too": ["run", "-f", str(source), "-o", str(home / "link.jsonl"), "x"],
        "is the prompt cache too": ["run", "-f", str(source), "--prompt-cache", str(source), "x"],
        "is the profile too": ["run", "--profile", str(source), "-f", str(source), "x"],
        "is a part of the output too": ["run", "-o", str(out), "--prompt-cache", f"{out}.part", "x"],
        "is the plot too": ["bench", "cache", "--text", str(source), "--plot", str(source)],
        "is the report too": ["bench", "drafters", "--suite", str(source), "--output", str(source)],
        "is the set too": ["tune", "-m", str(source), "--output", str(source)],
        "is the output too, so": ["train", "clover", "--prompts", str(source), "-o", str(source)],
    }
    for said, arguments in others.items():
        assert guarded([*arguments, *([] if "-m" in arguments else ["-m", tiny])]) == 2, arguments
        assert said in capfd.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def limited(arguments: Sequence[str], home: Path, nbytes: int) -> subprocess.CompletedProcess[bytes]:
    """The command where no file may grow beyond so many bytes."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        cwd=ROOT,
        env=environment(home, {"LONGSPEC_COMPILER": "none", "PYTHONDONTWRITEBYTECODE": "1"}),
        timeout=SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes)),
    )


def test_a_full_disk_leaves_whole_lines(tiny: str, home: Path) -> None:
    source, out = prompts(home / "in.jsonl", 20), home / "out"
    done = limited(["batch", str(source), "-o", str(out), "-m", tiny, *SETTINGS], home, 5000)
    assert done.returncode == 1
    assert b"File too large" in done.stderr or b"no space is left" in done.stderr
    assert b"Traceback" not in done.stderr
    there = answers(out)
    assert 0 < len(there) < 20
    assert batch(tiny, source, out) == 0
    assert len(answers(out)) == 20
    assert there.items() <= answers(out).items()


@pytest.mark.parametrize("signals", [1, 2])
def test_interrupted(tiny: str, home: Path, signals: int) -> None:
    source, out = prompts(home / "in.jsonl", 200), home / "out"
    arguments = ["batch", str(source), "-o", str(out), "-m", tiny, *SETTINGS, "--max-new-tokens", "60"]
    with started(arguments, home) as process:
        end = time.monotonic() + SECONDS
        while not out.exists() or not out.stat().st_size:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
    there = answers(out)
    assert 0 < len(there) < 200
    assert batch(tiny, source, out, "--max-new-tokens", "60", "--limit", str(len(there) + 3)) == 0
    assert there.items() <= answers(out).items()


@pytest.mark.full
def test_memory_does_not_grow_with_the_input(tiny: str, home: Path) -> None:
    program = (
        "import sys; from longspec.cli.main import guarded; from longspec.machine.system import peak_bytes\n"
        "code = guarded(sys.argv[1:]); print(code, peak_bytes())"
    )
    peaks = []
    for count in (2_000, 20_000):
        source = prompts(home / f"{count}.jsonl", count)
        arguments = ["batch", str(source), "-o", str(home / f"{count}.out"), "-m", tiny, *SETTINGS]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments, "--max-new-tokens", "1"],
            capture_output=True,
            cwd=ROOT,
            env=environment(home),
            check=True,
        )
        code, peak = done.stdout.split()
        assert code == b"0"
        peaks.append(int(peak))
        assert len(answers(home / f"{count}.out")) == count
    assert peaks[1] < peaks[0] + (24 << 20)
