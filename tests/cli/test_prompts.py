"""Templates, what `run` makes of them, answers line by line, answers into files, and what a shell completes."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import forked
from support.commands import ROOT, SECONDS, environment, inside, started, write_tiny

from longspec.cli.commands.prompts import folders
from longspec.cli.main import guarded
from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.errors import UsageError
from longspec.text.detokenizer import decode
from longspec.text.prompt_template import find, names, parse, read

SHIPPED = ROOT / "prompts"
TINY = ["--threads", "1", "--dtype", "fp32"]
NAMES = ["classify", "commit-message", "demo", "explain", "extract", "keywords", "name-things", "reason", "regex"]
NAMES += ["review", "rewrite", "sql", "summarize", "title", "translate"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("tiny"), context=2000))


def own(name: str, text: str) -> Path:
    """A template of the user's."""
    folder = folders()[0]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    path.write_text(text)
    return path


def answer(arguments: list[str], capfd: Capture) -> dict[str, object]:
    """What --json says of one run."""
    assert guarded(["run", "--json", *TINY, *arguments]) == 0
    found: dict[str, object] = json.loads(capfd.readouterr().out)
    return found


def refused(arguments: list[str], capfd: Capture) -> str:
    """The sentence of a wrong request."""
    assert guarded(arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return err


# --- templates


def test_every_shipped_template_renders() -> None:
    shipped = names([SHIPPED])
    assert set(NAMES) <= set(shipped)
    for name, path in shipped.items():
        template = read(path)
        assert template.description.endswith(".") or name == "commit-message"
        needed = {each: "apples" for each, parameter in template.parameters.items() if parameter.default is None}
        text = template.render("A {{ b }} text.\nIts end." if template.takes_input else None, needed)
        assert ("A {{ b }} text.\nIts end." in text) == template.takes_input
        assert text == text.strip()
        for value in template.values(needed).values():
            assert value in text
        assert all(parameter.help for parameter in template.parameters.values())


def test_what_a_template_says() -> None:
    template = parse(
        "greet",
        '+++\ndescription = "Greets."\nsystem = "Be kind."\nstop = "\\n"\ntemperature = 0.5\nmax_new_tokens = 9\n'
        '[parameters.who]\nhelp = "whom"\n[parameters.tone]\ndefault = "soft"\n+++\n'
        "{% if tone == 'soft' %}\n  Softly: {% endif %}hello, {{ who }} and {{ input }}\n",
    )
    assert template.defaults == {"system": "Be kind.", "stop": ["\n"], "temperature": 0.5, "max_new_tokens": 9}
    assert template.render("all", {"who": "you"}) == "Softly: hello, you and all"
    assert template.render("all", {"who": "you", "tone": ""}) == "hello, you and all"
    with pytest.raises(UsageError, match=r"needs the parameter 'who' \(whom\); give it: --param who=TEXT"):
        template.render("all")
    with pytest.raises(UsageError, match="no parameter 'tune'; did you mean tone"):
        template.render("all", {"who": "you", "tune": "x"})
    with pytest.raises(UsageError, match="needs an input"):
        template.render(None, {"who": "you"})


def test_what_a_template_holds_its_answer_to() -> None:
    chosen = parse("sort", "+++\nchoices = 'of'\n[parameters.of]\ndefault = 'a.b, c  d,,e'\n+++\n{{ of }}{{ input }}")
    assert chosen.options({}) == {"regex": r"a\.b|c d|e"}
    assert chosen.options({"of": "(x)"}) == {"regex": r"\(x\)"}
    with pytest.raises(UsageError, match="needs of to choose from"):
        chosen.options({"of": " , "})
    assert parse("held", "+++\nregex = 'a+'\n+++\n{{ input }}").options({}) == {"regex": "a+"}
    from longspec.constraints.grammar import grammar_of

    for name in ("classify", "regex", "title", "sql"):
        assert grammar_of(None, read(names([SHIPPED])[name]).options({})["regex"]) is not None
        assert re.fullmatch(read(names([SHIPPED])["title"]).options({})["regex"], "A title, of words: few")


def test_a_body_alone_is_a_template() -> None:
    plain = parse("plain", "Say {{ input }}!\n")
    assert (plain.render("hi"), plain.defaults, plain.parameters) == ("Say hi!", {}, {})
    assert not parse("fixed", "Say hi.\n").takes_input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("+++\nsystem = 'x'\n", r"has no second one"),
        ("+++\nsystem = \n+++\n", r"isn't TOML"),
        ("+++\nsytem = 'x'\n+++\n", r"sets 'sytem' at its top; did you mean system"),
        ("+++\ntemperature = -1\n+++\n", r"sets 'temperature' to -1; it must be a number, 0 or more"),
        ("+++\ntemperature = inf\n+++\n", r"sets 'temperature' to inf"),
        ("+++\ntop_k = 1.5\n+++\n", r"sets 'top_k' to 1.5; it must be a whole number"),
        ("+++\nseed = true\n+++\n", r"sets 'seed' to True"),
        ("+++\nstop = ['']\n+++\n", r"sets 'stop'"),
        ("+++\nsystem = 3\n+++\n", r"sets 'system' to 3; it must be a text"),
        ("+++\nregex = 3\n+++\n", r"sets 'regex' to 3; it must be a text"),
        ("+++\nchoices = 'a'\n+++\n", r"sets 'choices' to 'a'; it must name a parameter"),
        ("+++\nparameters = 3\n+++\n", r"sets 'parameters' to no table"),
        ("+++\n[parameters]\na = 'b'\n+++\n{{ a }}", r"a parameter is a table"),
        ("+++\n[parameters.input]\n+++\n{{ input }}", r"a parameter 'input'; a name is"),
        ("+++\n[parameters.a]\n+++\n{{ input }}", r"has the parameter 'a' and doesn't use it"),
        ("{{ tone }}", r"uses 'tone', which is no parameter; add \[parameters.tone\]"),
        ("{{ range(3) }}", r"uses 'range'"),
        ("one\n{% if %}", r"isn't Jinja, at its line 2"),
        ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", r"has a body that can't be read \(maximum recursion"),
        ("+++\na = " + "[" * 9000 + "]" * 9000 + "\n+++\n", r"nested too deeply"),
        (f"+++\ntop_k = {'9' * 5000}\n+++\n", r"isn't TOML: Exceeds the limit"),
    ],
)
def test_what_is_no_template(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse("wrong", text)


@pytest.mark.parametrize(
    "body",
    [
        "{{ input.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% include 'demo.md' %}",
        "{{ input.nothing }}",
        "{{ 1 // 0 }}",
        "{{ input + 1 }}",
        "{% for a in input %}{% for b in input %}{% for c in input %}{{ input }}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in input %}" * 60 + "{% endfor %}" * 60,
    ],
)
def test_a_template_can_do_nothing_but_write(body: str) -> None:
    with pytest.raises(UsageError, match=r"wrong (failed|makes more than 64 Mi letters)"):
        parse("wrong", body).render("x" * 1000)


def test_files_are_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "large.md").write_text("x" * 70_000)
    (tmp_path / "bytes.md").write_bytes(b"caf\xe9")
    (tmp_path / "nul-\0.md".replace("\0", "")).write_text("{{ input }}")
    (tmp_path / "a b.md").write_text("{{ input }}")
    (tmp_path / "dos.md").write_bytes(b"\xef\xbb\xbf+++\r\nseed = 3\r\n+++\r\n{{ input }}\r\n")
    assert read(tmp_path / "dos.md").defaults == {"seed": 3}
    with pytest.raises(UsageError, match="more than 64 KiB"):
        read(tmp_path / "large.md")
    with pytest.raises(UsageError, match="byte 3 isn't UTF-8"):
        read(tmp_path / "bytes.md")
    with pytest.raises(UsageError, match="can't be read: No such file"):
        read(tmp_path / "none.md")
    assert "a b" not in names([tmp_path])
    for wrong in ("..", "", "a b", "../dos"):
        with pytest.raises(UsageError):
            read(find(wrong, [tmp_path / "deeper"]))


# --- longspec prompts


def test_the_users_own_go_first(home: Path, capfd: Capture) -> None:
    own("translate", "+++\ndescription = 'Mine.'\n+++\nInto Latin: {{ input }}")
    own("broken", "{{ oops }}")
    assert guarded(["prompts", "list"]) == 0
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in capfd.readouterr().out.splitlines()}
    assert rows["translate"] == ["yours", "Mine."]
    assert rows["summarize"][0] == "shipped"
    assert "uses 'oops'" in rows["broken"][1]
    assert guarded(["prompts", "list", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert {each["name"] for each in listed} == set(rows)
    assert set(listed[0]) == {"name", "origin", "description", "path"}
    assert guarded(["prompts", "show", "translate"]) == 0
    assert capfd.readouterr().out.endswith("Into Latin: {{ input }}\n")


def test_new_ones(home: Path, capfd: Capture) -> None:
    assert guarded(["prompts", "path"]) == 0
    folder = capfd.readouterr().out.strip()
    assert folder == str(home / "config" / "longspec" / "prompts")
    assert guarded(["prompts", "new", "haiku"]) == 0
    path = Path(capfd.readouterr().out.strip())
    assert path == Path(folder) / "haiku.md"
    assert read(path).render("rain").endswith("rain")
    assert guarded(["prompts", "new", "sql"]) == 0  # a copy of the shipped one
    assert Path(capfd.readouterr().out.strip()).read_text() == (SHIPPED / "sql.md").read_text()
    assert guarded(["prompts", "path", "sql"]) == 0
    assert capfd.readouterr().out.strip() == f"{folder}/sql.md"
    assert "is there already" in refused(["prompts", "new", "haiku"], capfd)
    assert "can't be a template's name" in refused(["prompts", "new", "../haiku"], capfd)
    assert "did you mean summarize" in refused(["prompts", "show", "sumarize"], capfd)


# --- run --template


def test_run_fills_a_template(tiny: str, home: Path, capfd: Capture) -> None:
    own("greet", "+++\nmax_new_tokens = 7\n[parameters.who]\n+++\nhello {{ who }}: {{ input }}")
    (home / "file").write_text("from a file\n")
    plain = ["run", "hello you: hi\n\nfrom a file\n\nand a pipe", "--no-stdin", "-m", tiny, *TINY, "--max-tokens", "7"]
    assert guarded(plain) == 0
    wanted = capfd.readouterr().out
    arguments = ["run", "-t", "greet", "-p", "who=you", "hi", "-f", str(home / "file"), "-m", tiny, *TINY]
    filled = inside(arguments, home, b"and a pipe\n")
    assert (filled.code, filled.out.decode(), filled.err) == (0, wanted, "")
    by_path = [*arguments[:2], f"{folders()[0]}/greet.md", *arguments[3:]]
    assert inside(by_path, home, b"and a pipe\n").out.decode() == wanted


def test_a_template_holds_the_answer(tiny: str, home: Path, capfd: Capture) -> None:
    own("sort", "+++\nchoices = 'of'\n[parameters.of]\n+++\n{{ of }}: {{ input }}")
    asked = ["--no-stdin", "hi", "-m", tiny, "-t", "sort", "-p", "of=ABAB, CDCD", "--max-tokens", "9"]
    assert answer(asked, capfd)["text"] in ("ABAB", "CDCD")
    assert answer([*asked, "--regex", "E{3}F"], capfd)["text"] == "EEEF"


def test_flag_then_template_then_settings(tiny: str, home: Path, capfd: Capture) -> None:
    (home / "config" / "longspec").mkdir(parents=True)
    (home / "config" / "longspec" / "config.toml").write_text(
        f'model = "{tiny}"\nmax_new_tokens = 3\nraw = true\ntop_p = 0.5\nstop = ["~"]\n'
    )
    own("set", '+++\nsystem = "Be kind."\nmax_new_tokens = 5\ntemperature = 0\n+++\n{{ input }}')

    def usage(*arguments: str) -> tuple[int, int]:
        found = answer(["--no-stdin", "hi", *arguments], capfd)["usage"]
        assert isinstance(found, dict)
        return found["prompt_tokens"], found["completion_tokens"]

    system = len("sBe kind.")
    assert usage("--temperature", "1") == (2, 3)
    assert usage("-t", "set") == (system + 4, 5)  # top_p has gone with the temperature, raw with the system message
    assert usage("-t", "set", "--max-tokens", "6", "-s", "No.") == (len("sNo.") + 4, 6)
    assert usage("-t", "set", "--raw") == (2, 5)
    assert usage("-t", "set", "--temperature", "2", "--top-k", "4") == (system + 4, 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-t", "sumarize", "hi"], "no template 'sumarize'; did you mean summarize?"),
        (["-t", "zzz", "hi"], "there are: classify, commit-message"),
        (["-t", "extract", "hi"], "needs the parameter 'what' (what to look for"),
        (["-t", "extract", "-p", "wat=x", "hi"], "did you mean what?"),
        (["-t", "title", "-p", "x=y", "hi"], "it has none at all"),
        (["-t", "title", "-p", "x", "hi"], "'x' is no assignment; write NAME=VALUE"),
        (["-t", "./none.md", "hi"], "none.md can't be read"),
        (["-t", "demo", "hi"], "demo takes no input, and one was given"),
        (["-t", "title"], "The prompt is empty"),
        (["-p", "to=German", "hi"], "there is no --template"),
        (["--each-line", "-t", "demo"], "demo takes no input"),
        (["hi", "-o", "{home}"], "isn't an ordinary file"),
        (["hi", "-o", "{home}/no/such/folder"], "can't be written: No such file"),
        (["hi", "-o", "/dev/null"], "isn't an ordinary file"),
        (["hi", "-o", "/"], "isn't an ordinary file"),
    ],
)
def test_wrong_requests(arguments: list[str], said: str, home: Path, capfd: Capture) -> None:
    stdin = [] if "--each-line" in arguments else ["--no-stdin"]
    told = [part.replace("{home}", str(home)) for part in arguments]
    assert said in refused(["run", *stdin, *told], capfd)


def test_each_line_needs_standard_input(home: Path, capfd: Capture) -> None:
    assert "leave one out" in refused(["run", "--each-line", "--no-stdin"], capfd)


# --- run --each-line


def test_each_line(tiny: str, home: Path, capfd: Capture) -> None:
    """The answers are those of runs of their own; what is wrong with a line costs that line alone."""
    lines = [b"one", b"", b"caf\xe9", b"two\r", b"x" * 3000, b" \t", b"one"]
    options = ["-m", tiny, *TINY, "--max-new-tokens", "30", "--temperature", "2"]
    result = inside(["run", "--each-line", "Say:", *options, "--quiet"], home, b"\n".join(lines))
    assert result.code == 1
    found = result.out.decode().split("\n")
    alone = []
    for word in ("one", "two"):
        assert guarded(["run", "--no-stdin", f"Say:\n\n{word}", *options]) == 0
        alone.append(" ".join(capfd.readouterr().out.split("\n")).strip())
    assert found == [alone[0], "", "", alone[1], "", "", alone[0], ""]
    wrong = result.err.splitlines()
    assert wrong[0].startswith("longspec: line 3: it isn't text: byte 3")
    assert wrong[1].startswith("longspec: line 5: The prompt has 30")
    assert wrong[2].startswith("longspec: 2 of 7 lines couldn't be answered")
    assert len(wrong) == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("its grammar gave up"), "its grammar gave up"),
        (RuntimeError("shapes don't match"), "The text could not be written: RuntimeError: shapes don't match."),
        (MemoryError(), "The machine has no memory left for this text"),
    ],
    ids=["grammar", "bug", "memory"],
)
def test_what_fails_in_an_answer_costs_its_line_alone(
    tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    step = Engine.step

    def failing(self: Engine, sessions: Sequence[Session], *rest: Any) -> Any:
        if "longer" in decode(self.model.vocabulary, sessions[0].tokens) and len(sessions[0].answer) > 2:
            raise error
        return step(self, sessions, *rest)

    monkeypatch.setattr(Engine, "step", failing)
    options = ["-m", tiny, *TINY, "--max-new-tokens", "5", "--json"]
    result = inside(["run", "--each-line", *options], home, b"one\na longer line\ntwo\n")
    first, wrong, last = map(json.loads, result.out.decode().splitlines())
    assert result.code == 1
    assert [each["usage"]["completion_tokens"] for each in (first, last)] == [5, 5]
    assert wrong["error"].startswith(said)
    assert result.err.splitlines() == [
        f"longspec: line 2: {wrong['error']}",
        "longspec: 1 of 3 lines couldn't be answered; why is said above.",
    ]


def test_what_every_line_would_say_is_said_once(tiny: str, home: Path) -> None:
    result = inside(["run", "--each-line", "-m", tiny, *TINY, "--effort", "high"], home, b"one\ntwo\n")
    assert (result.code, result.out, result.err.count("\n")) == (2, b"", 1)


def test_each_line_as_objects(tiny: str, home: Path) -> None:
    options = ["-m", tiny, *TINY, "--max-new-tokens", "5", "--json", "--stats"]
    result = inside(["run", "--each-line", "-t", "translate", *options], home, b"one\n\n\0\n")
    first, blank, wrong, end = result.out.decode().split("\n")
    assert (result.code, blank, end) == (1, "", "")
    assert json.loads(first)["usage"]["completion_tokens"] == 5
    assert "NUL" in json.loads(wrong)["error"]
    assert "line 1: 5 tokens in" in result.err


def test_each_line_answers_as_lines_come(tiny: str, home: Path) -> None:
    """A line is answered before the next one is there; a signal while it waits ends it with what it has written."""
    arguments = ["run", "--each-line", "-m", tiny, *TINY, "--max-new-tokens", "5"]
    with started(arguments, home, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):
            process.stdin.write(b"hi\n")
            process.stdin.flush()
            assert len(process.stdout.readline().decode()) > 1
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        assert process.stdout.read() == b""


def test_nothing_in_nothing_out(home: Path) -> None:
    """And no model is loaded for it."""
    assert inside(["run", "--each-line", "-m", "/none"], home, b"").code == 0
    blank = inside(["run", "--each-line", "-m", "/none"], home, b"\n\n")
    assert (blank.code, blank.out, blank.err) == (0, b"\n\n", "")


# --- run --output


def test_a_file_is_the_whole_answer(tiny: str, home: Path, capfd: Capture) -> None:
    options = ["--no-stdin", "-m", tiny, *TINY, "--max-new-tokens", "20", "hi"]
    assert guarded(["run", *options]) == 0
    text = capfd.readouterr().out
    path, link = home / "answer", home / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    (home / "answer.part").write_text("left over from an earlier run, and longer than the answer" * 9)
    for name in (path, link):
        assert guarded(["run", *options, "-o", str(name)]) == 0
        assert capfd.readouterr() == ("", "")
        assert path.read_text() == text
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert not (home / "answer.part").exists()
    assert guarded(["run", *options, "-o", "-"]) == 0
    assert capfd.readouterr().out == text
    assert guarded(["run", *options, "--json", "-o", str(path)]) == 0
    assert json.loads(path.read_text())["text"] == text.removesuffix("\n")


def test_an_interrupted_file_is_a_part(tiny: str, home: Path) -> None:
    path, part = home / "answer", home / "answer.part"
    path.write_text("before")
    with started(["run", "hi", "-m", tiny, *TINY, "--max-new-tokens", "1900", "-o", str(path)], home) as process:
        assert process.stderr is not None
        for _ in range(int(SECONDS * 100)):
            if part.exists() and part.stat().st_size > 20:
                break
            threading.Event().wait(0.01)
        busy = inside(["run", "hi", "-m", tiny, "-o", str(path)], home)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        assert process.stderr.read().decode() == f"longspec: what was written is in {part}\n"
    assert (busy.code, "by another run" in busy.err) == (2, True), busy.err
    assert path.read_text() == "before"
    assert part.stat().st_size > 20


def test_nothing_is_left_where_nothing_was_written(tiny: str, home: Path, capfd: Capture) -> None:
    path = home / "answer"
    assert guarded(["run", "--no-stdin", "hi", "-m", tiny, "--cache", "shoebox", "-o", str(path)]) == 2
    assert list(home.glob("answer*")) == []
    (home / "elsewhere").write_text("mine")
    (home / "answer.part").symlink_to(home / "elsewhere")
    assert guarded(["run", "--no-stdin", "hi", "-m", tiny, "-o", str(path)]) == 2
    assert (home / "elsewhere").read_text() == "mine"


def test_nothing_is_left_of_a_run_that_is_ended_before_it_wrote(home: Path) -> None:
    arguments = ["run", "--each-line", "-o", str(home / "answer")]
    with started(arguments, home, stdin=subprocess.PIPE) as process:
        for _ in range(int(SECONDS * 100)):
            if (home / "answer.part").exists():
                break
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
    assert list(home.glob("answer*")) == []


def test_lines_into_a_file(tiny: str, home: Path) -> None:
    path = home / "answers"
    arguments = ["run", "--each-line", "-m", tiny, *TINY, "--max-new-tokens", "5", "-o", str(path)]
    assert inside(arguments, home, b"a\n\nb\n").code == 0
    assert [bool(line) for line in path.read_text().split("\n")] == [True, False, True, False]
    failed = inside(arguments, home, b"a\n\xff\nb\n")  # the others are there, and the exit code says that one isn't
    assert (failed.code, len((home / "answers").read_text().splitlines())) == (1, 3)
    assert "couldn't be answered" in failed.err


# --- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, home: Path, capfd: Capture) -> None:
    assert guarded(["completion", shell]) == 0
    script = capfd.readouterr().out
    assert f"_LONGSPEC_COMPLETE=complete_{shell}" in script


def test_completion_of_a_wrong_shell(home: Path, capfd: Capture) -> None:
    assert "'csh'" in refused(["completion", "csh"], capfd)


def test_bash_completes(home: Path) -> None:
    own("haiku", "{{ input }}")
    program = home / "longspec"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m longspec.cli.main "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(longspec completion bash)"\n'
        'try() { COMP_WORDS=(longspec "$@"); COMP_CWORD=$#; _longspec_completion longspec;'
        ' echo "${COMPREPLY[*]}"; }\n'
        "try pro; try run --each; try run -t ha; try prompts s; try run -t nam"
    )
    path = f"{home}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment(home, {"PATH": path})
    )
    assert (done.stdout.splitlines(), done.stderr) == (["prompts", "--each-line", "haiku", "show", "name-things"], "")


def test_help_needs_no_jinja() -> None:
    program = (
        "import sys; from longspec.cli.main import guarded\n"
        "calls = ['-h'], ['run', '--help-all'], ['prompts', '-h'], ['prompts', 'new', '-h']\n"
        "codes = [guarded(call) for call in calls]\n"
        "print(codes, [m for m in ('torch', 'jinja2', 'rich') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, text=True, check=True)
    assert done.stderr == "[0, 0, 0, 0] []\n"
    for word in ("--template", "--param", "--each-line", "--output", "list", "show", "path"):
        assert word in done.stdout


# --- the default model


@pytest.mark.real
def test_a_commit_message_of_a_diff() -> None:
    """As at a terminal; the environment's own folders, where the model is."""
    diff = "--- a/greet.py\n+++ b/greet.py\n@@ -1,2 +1,2 @@\n def greet():\n-    print('Helo')\n+    print('Hello')\n"
    command = [*forked.command(), "run", "-t", "commit-message", "--max-new-tokens", "40"]
    done = subprocess.run(command, input=diff, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 2
