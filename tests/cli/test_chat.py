"""A conversation: what turns share of the cache, what is kept of answers, and the command at terminals and in pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.commands import COMMAND, ROOT, Terminal, environment, inside, started, write_tiny
from support.engines import engine, tiny
from support.letters import tokenizer_of

import longspec.engine.passes
from longspec.cache import CACHES
from longspec.cli.io.colour import coloured
from longspec.engine.conversation import Conversation, cache_path
from longspec.engine.engine import Engine
from longspec.engine.forward import Input
from longspec.errors import LongspecError, UsageError
from longspec.model.load import Model
from longspec.text.prompt import encode
from longspec.text.tokenizer import Vocabulary

QUESTIONS = ["AbCdEf" * 25, "what is it", "AbCdEf" * 12 + "?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def merging(answer: str = "{{ m.content }}") -> Vocabulary:
    """A vocabulary in which `aa` is one token or two."""
    names = ["<pad>", "<s>", "</s>", "a", "b", "aa", " ", "u", "A", "\n"]
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}u{{ m.content }}{% else %}A" + answer + "{% endif %}</s>"
        "{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    return Vocabulary(tokenizer_of(names, [("a", "a")]), {"eos_token": "</s>"}, template)


def talk(made: Engine, questions: list[str], **settings: Any) -> Conversation:
    conversation = Conversation(made, system="Be", max_new_tokens=40, **settings)
    for question in questions:
        assert "".join(conversation.stream(question)) == conversation.messages[-1]["content"]
    return conversation


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of the text that each pass has fed, drafts left out."""
    counts: list[int] = []

    def counted(choosing: list[Input], others: list[Input], *more: Any) -> Any:
        counts.append(sum(len(one.lacking) for one in (*choosing, *others)))
        return longspec.engine.forward.forward(choosing, others, *more)

    monkeypatch.setattr(longspec.engine.passes, "forward", counted)
    return counts


def _matrix() -> Iterator[Any]:
    """The usual run has every cache sampled, and one of rows and one of codes greedily."""
    for kind, (way, settings) in product(CACHES, {"sampled": {"temperature": 0.8, "seed": 3}, "greedy": {}}.items()):
        usual = way == "sampled" or kind in ("dense", "int4")
        yield pytest.param(kind, settings, id=f"{kind}-{way}", marks=[] if usual else pytest.mark.full)


@pytest.mark.parametrize(("kind", "settings"), list(_matrix()))
def test_a_kept_cache_changes_no_text(model: Model, kind: str, settings: dict[str, Any]) -> None:
    made = engine(model, "ngram", cache=kind)
    conversation = talk(made, QUESTIONS, **settings)
    session = conversation.session
    assert session is not None
    anew = made.open(conversation.messages[:-1], max_new_tokens=40, **settings)
    for _ in made.write(anew):
        pass
    assert anew.tokens == session.tokens
    assert (anew.cached, anew.text) == (0, conversation.messages[-1]["content"])
    assert session.cached > 150


@pytest.mark.parametrize("kind", CACHES)
def test_only_what_is_new_is_fed(model: Model, kind: str, fed: list[int]) -> None:
    made = engine(model, cache=kind)
    conversation = talk(made, QUESTIONS[:2])
    earlier = conversation.session
    assert earlier is not None
    rows = earlier.cache.length
    fed.clear()
    session = conversation.ask("third")
    for _ in made.write(session):
        pass
    assert session.cached == rows == len(earlier.tokens) - 1
    new = session.prompt_length - rows
    assert new == len("third") + 1 + 2  # the last answer's last token, and two letters for the roles
    assert sum(fed) == new + len(session.answer) - 1


# --- the messages


def test_an_answer_keeps_its_own_tokens() -> None:
    """Where a text has several tokenisations, the model's own stands in the history."""
    vocabulary = merging()
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "aa"},
        {"role": "assistant", "content": "aab", "tokens": [3, 3, 4]},
        {"role": "user", "content": "b"},
    ]
    ending, answer = (
        vocabulary.encode("</s>ub</s>A", add_special=False),
        vocabulary.encode("uaa</s>A", add_special=False),
    )
    assert encode(vocabulary, messages) == [*answer, 3, 3, 4, *ending]
    assert encode(vocabulary, [{**message, "tokens": None} for message in messages]) == [*answer, 5, 4, *ending]


@pytest.mark.parametrize("tokens", [[5, 3], [5], [3, 3, 4, 4], [3, 3, 99], []])
def test_tokens_that_are_another_text_do_not_count(tokens: list[int]) -> None:
    said = {"role": "assistant", "content": "aab", "tokens": tokens}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "a"}, said]
    assert encode(merging(), messages) == encode(merging(), [{**m, "tokens": None} for m in messages])


def test_a_template_that_changes_answers_has_them_tokenised() -> None:
    """One that trims them, or leaves out a part: the text is read anew from there on."""
    vocabulary = merging("{{ m.content | trim }}")
    said = {"role": "assistant", "content": "aab ", "tokens": [3, 3, 4, 6]}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "a"}, said]
    assert encode(vocabulary, messages) == encode(vocabulary, [messages[0], {"role": "assistant", "content": "aab"}])


def test_a_cache_is_given_to_one_text_only(model: Model) -> None:
    made = engine(model)
    first = made.open("AbAbAb", max_new_tokens=20)
    with pytest.raises(UsageError, match="still being written"):
        made.open("AbAbAb", after=first)
    for _ in made.write(first):
        pass
    texts = []
    for _ in range(2):
        session = made.open("AbAbAb and on", max_new_tokens=20, after=first)
        for _ in made.write(session):
            pass
        texts.append((session.cached > 0, session.text))
    assert [cached for cached, _ in texts] == [True, False]
    assert texts[0][1] == texts[1][1]


def test_turns_are_taken_back(model: Model) -> None:
    conversation = talk(engine(model, cache="int8"), QUESTIONS[:2], temperature=1.0)
    before = list(conversation.messages)
    again = conversation.again()
    for _ in conversation.engine.write(again):
        pass
    assert conversation.keep()
    assert conversation.messages[:-1] == before[:-1]
    assert conversation.messages[-1]["content"] != before[-1]["content"]
    kept = list(conversation.messages)
    conversation.ask("never answered")
    assert not conversation.keep()
    assert conversation.messages == kept
    for piece in conversation.stream("broken off"):
        assert piece
        break
    assert conversation.messages[-2]["content"] == "broken off"
    conversation.reset()
    assert (conversation.turns, conversation.system, len(conversation.messages)) == (0, "Be", 1)
    conversation.system = None
    assert conversation.messages == []
    with pytest.raises(UsageError, match="Nothing was asked"):
        conversation.again()


def test_an_error_in_a_step_costs_the_cache_only(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = talk(engine(model), QUESTIONS[:1])
    with monkeypatch.context() as broken:
        broken.setattr(conversation.engine.model.decoder, "logits", lambda hidden: 1 // 0)
        session = conversation.ask("on")
        with pytest.raises(ZeroDivisionError):
            list(conversation.engine.write(session))
    assert conversation.ask("on").cached == 0


# --- saved conversations


@pytest.mark.parametrize("kind", CACHES)
def test_a_saved_conversation_goes_on_without_prefill(model: Model, kind: str, tmp_path: Path, fed: list[int]) -> None:
    made, path = engine(model, cache=kind), tmp_path / "talk.json"
    conversation = talk(made, QUESTIONS[:2], temperature=0.7, seed=5)
    conversation.save(path)
    conversation.save(path)  # what is there is ours, and may be replaced
    assert sorted(each.name for each in tmp_path.iterdir()) == ["talk.json", "talk.json.cache"]
    went_on = list(conversation.stream("third"))
    fed.clear()
    loaded = Conversation.load(engine(model, cache=kind), path)
    assert (loaded.notes, loaded.turns, loaded.settings["temperature"]) == ([], 2, 0.7)
    assert list(loaded.stream("third")) == went_on
    assert loaded.messages == conversation.messages
    session, other = loaded.session, conversation.session
    assert session is not None
    assert other is not None
    assert (session.tokens, session.cached) == (other.tokens, other.cached)
    assert fed[0] == session.prompt_length - 1 - session.cached < len("third") + 3


def test_a_cache_that_is_no_use_is_only_slower(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    conversation = talk(engine(model), QUESTIONS[:1])
    conversation.save(path)
    went_on = list(conversation.stream("on"))
    for damage in (lambda data: data[:100], lambda data: b"longspec" + data[::-1], lambda data: b""):
        whole = cache_path(path).read_bytes()
        cache_path(path).write_bytes(damage(whole))
        loaded = Conversation.load(engine(model), path)
        assert len(loaded.notes) == 1
        assert list(loaded.stream("on")) == went_on
        cache_path(path).write_bytes(whole)
    other = Conversation.load(engine(model, cache="int4"), path)
    assert "int4" in other.notes[0]
    cache_path(path).unlink()
    assert list(Conversation.load(engine(model), path).stream("on")) == went_on


def test_saving_replaces_no_file_of_others(model: Model, tmp_path: Path) -> None:
    conversation = talk(engine(model), ["hi"])
    for name in ("talk", "talk.cache"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match="isn't a saved conversation"):
            conversation.save(tmp_path / "talk")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", tmp_path / "none" / "talk", Path("/dev/null")):
        with pytest.raises(LongspecError):
            conversation.save(place)
    assert list((tmp_path / "folder").iterdir()) == []


ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tokens": [4]}


@pytest.mark.parametrize(
    "change",
    [
        {"longspec_conversation": 2},
        {"model": 1},
        {"settings": []},
        {"settings": {"prompt_cache": "/etc/passwd"}},
        {"settings": {"temperature": float("nan")}},
        {"settings": {"temperature": 10**400}},
        {"settings": {"temperature": -1}},
        {"settings": {"seed": 0.5}},
        {"settings": {"max_new_tokens": True}},
        {"settings": {"stop": [""]}},
        {"settings": {"top_k": 3}},
        {"messages": {}},
        {"messages": [ANSWERED]},
        {"messages": [ASKED]},
        {"messages": [ASKED, ASKED]},
        {"messages": [ASKED, {**ANSWERED, "content": ["b"]}]},
        {"messages": [ASKED, {**ANSWERED, "content": "\ud800"}]},
        {"messages": [ASKED, {**ANSWERED, "tokens": [True]}]},
        {"messages": [ASKED, {**ANSWERED, "tokens": [-1]}]},
        {"messages": [ASKED, {**ANSWERED, "tokens": "b"}]},
        {"messages": [{**ASKED, "tokens": [4]}, ANSWERED]},
        {"messages": [{**ASKED, "tool_calls": []}, ANSWERED]},
    ],
    ids=str,
)
def test_files_of_others_are_refused(model: Model, tmp_path: Path, change: dict[str, Any]) -> None:
    whole = {"longspec_conversation": 1, "model": "tiny", "settings": {}, "messages": [ASKED, ANSWERED]}
    path = tmp_path / "talk"
    path.write_text(json.dumps(whole))
    assert Conversation.load(engine(model), path).turns == 1
    path.write_text(json.dumps({**whole, **change}))
    with pytest.raises(UsageError):
        Conversation.load(engine(model), path)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"null", b"{}"])
def test_files_that_are_nothing_are_refused(model: Model, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "talk").write_bytes(data)
    for path in (tmp_path / "talk", tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(UsageError):
            Conversation.load(engine(model), path)


# --- colours


def test_drafted_characters_are_coloured() -> None:
    def plainly(text: str) -> str:
        return text.replace("\x1b[36m", "(").replace("\x1b[0m", ")")

    begins, drafted = [0, 2, 2, 5], [True, False, True, True]  # the second is a part of the third's first character
    assert plainly(coloured("abcdefg", 0, begins, drafted)) == "(ab)(cde)(fg)".replace(")(", "")
    assert plainly(coloured("bcd", 1, begins, [False, True, False, True])) == "bcd"
    assert plainly(coloured("bcdefg", 1, begins, [True, True, False])) == "(b)cdefg"
    assert coloured("", 3, begins, drafted) == ""
    assert coloured("ab", 0, [], []) == "ab"


@pytest.mark.parametrize("stop", [(), ("q1",)])
def test_colours_follow_commits(model: Model, stop: tuple[str, ...]) -> None:
    """A text that is held back for a stop string is coloured when it comes, by the tokens that it came from."""
    made = engine(model, "ngram")
    session = made.open("AbCdEf" * 30, max_new_tokens=60, stop=stop)
    drafted, shown, text = list[bool](), 0, ""
    for commit in made.write(session):
        drafted += [i < commit.accepted for i in range(len(commit.tokens))]
        text += coloured(commit.text, shown, session.begins, drafted)
        shown += len(commit.text)
    letters = [letter for letter, is_drafted in zip(session.text, drafted, strict=False) if is_drafted]
    inside = "".join(part.split("\x1b[0m")[0] for part in text.split("\x1b[36m")[1:])
    assert inside == "".join(letters)
    assert 0 < len(letters) < len(session.text)


# --- the command


PROMPT = b"\x1b[?2004h> "
TINY = ["--dtype", "fp32", "--temperature", "0", "--max-new-tokens", "12", "--quiet"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("checkpoint")))


class Talk:
    """`longspec chat` at a pseudo-terminal."""

    def __init__(self, arguments: list[str], home: Path, extra: dict[str, str] | None = None) -> None:
        self.child, self.ours = pty.fork()
        if self.child == 0:
            os.chdir(ROOT)
            own = {"XDG_STATE_HOME": str(home / "state"), "LONGSPEC_RAW_OUTPUT": "1"}  # test_page.py has pages
            settings = environment(home, {**own, **(extra or {})})
            os.execve(sys.executable, [*COMMAND, "chat", *arguments], settings)
        self.said = self.until(PROMPT)

    def until(self, wanted: bytes | None) -> str:
        return Terminal(self.ours).until(wanted).decode().replace("\r\n", "\n")

    def type(self, keys: str, wanted: bytes | None = PROMPT) -> str:
        """What stands on the terminal from these keys on, up to the next prompt."""
        os.write(self.ours, keys.encode())
        return self.until(wanted)

    def say(self, line: str) -> str:
        """What is answered to a line."""
        seen = self.type(line + "\r")
        begin = "\x1b[?2004l\r"
        return seen[seen.index(begin) + len(begin) : -len(PROMPT)].removesuffix("\n")

    def begin(self, line: str) -> str:
        """The first characters of a long answer, behind progress, whose end shows the cursor again."""
        os.write(self.ours, f"{line}\r".encode())
        seen = written = b""
        while len(written) < 200 or b"\x1b[?25l" in written:  # which hides it
            seen += os.read(self.ours, 100)
            written = seen.rpartition(b"\x1b[?25h")[2]
        return seen.decode(errors="ignore")

    def leave(self, keys: str = "\x04") -> int:
        os.write(self.ours, keys.encode())
        self.until(None)
        os.close(self.ours)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def test_a_conversation_at_a_terminal(tiny_folder: str, home: Path) -> None:
    """Commands, several lines, what is pasted, and what is remembered the next time."""
    talk = Talk(["-m", tiny_folder, *TINY], home)
    first = talk.say("hello")
    assert len(first) == 12
    piped = inside(["chat", "-m", tiny_folder, *TINY], home, b"hello\n")
    assert (piped.code, piped.out.decode(), piped.err) == (0, first + "\n", "")
    assert "/retry" in talk.say("/help")
    assert talk.say("/nothing").startswith("longspec: /nothing is no command")
    assert talk.say("/save") == "longspec: /save takes FILE: /save FILE."
    assert talk.say("/reset now") == "longspec: /reset takes nothing: /reset."
    assert talk.say("/system Be") == "the system message is set"
    assert len(talk.say("a\x1b\rb")) == 12
    assert len(talk.say("\x1b[200~pasted\rlines\x1b[201~")) == 12
    talk.type('"""one\r', b"\x1b[?2004h. ")
    assert len(talk.say('two"""')) == 12
    assert len(talk.say(" /etc is what?")) == 12
    assert talk.say(f"/save {home}/talk").startswith("saved 5 turns")
    assert talk.leave() == 0
    saved = json.loads((home / "talk").read_text())
    asked = [message["content"] for message in saved["messages"] if message["role"] != "assistant"]
    assert asked == ["Be", "hello", "a\nb", "pasted\nlines", "one\ntwo", "/etc is what?"]
    assert stat.S_IMODE((home / "state" / "longspec" / "history").stat().st_mode) == 0o600

    talk = Talk(["-m", tiny_folder, *TINY], home)
    assert "5 turns" in talk.say(f"/load {home}/talk")
    assert len(talk.say("\x1b[A" * 4)) == 12  # /load, /save, " /etc", and what was typed between quotes
    assert "6 turns; of" in talk.say("/stats")
    assert talk.say("/model /nowhere").startswith("longspec: ")
    assert talk.say(f"/model {tiny_folder}").startswith("going on with")
    assert len(talk.say("/retry")) == 12
    assert talk.say("/res\t") == "all that was said is forgotten; the system message stays"
    assert "0 turns" in talk.say("/stats")
    assert "Alt-Enter" in talk.say("?")
    assert talk.say("/clear") == talk.say("/reset")
    assert talk.say("/system") == "there is no system message from here on"
    assert talk.leave("exit\r") == 0


def test_interrupts_at_a_terminal(tiny_folder: str, home: Path) -> None:
    """Ctrl-C stops an answer; SIGTERM ends with what was written."""
    talk = Talk(["-m", tiny_folder, "--dtype", "fp32", "--temperature", "0"], home)
    seen = (talk.begin("hello") + talk.type("\x03")).replace("\r\n", "\n")
    assert "^C" not in seen
    assert "\x03" not in seen
    assert "stays in the conversation" in seen
    assert talk.type("\x03").endswith("> ")  # at the prompt it begins the line anew
    talk.say(f"/save {home}/talk")
    messages = json.loads((home / "talk").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"] in seen
    assert len(messages[1]["content"]) > 20
    talk.begin("on")
    os.kill(talk.child, signal.SIGTERM)
    assert talk.leave("") == 143


def test_interrupts_in_a_pipe(tiny_folder: str, home: Path) -> None:
    """There a signal ends it all, with what was written."""
    arguments = ["chat", "-m", tiny_folder, "--dtype", "fp32", "--temperature", "0"]
    with started(arguments, home, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        begun = os.read(process.stdout.fileno(), 10)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait() == 130
    assert (begun + rest).endswith(b"\n")


@pytest.mark.parametrize(
    ("stdin", "said"), [(b"ok\n\xff\n", "UTF-8"), (b"\0\n", "NUL"), (b"x" * 5000 + b"\n", "context")]
)
def test_wrong_lines_end_a_pipe(stdin: bytes, said: str, home: Path, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "short", context=500)
    done = inside(["chat", "-m", str(folder), *TINY], home, stdin)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert done.out.count(b"\n") == stdin.startswith(b"ok")


def test_drafts_in_colour(tiny_folder: str, home: Path) -> None:
    arguments = ["-m", tiny_folder, *TINY, "--max-new-tokens", "60", "--show-drafts", "--control", "fixed"]
    talk = Talk(arguments, home)
    assert "\x1b[36m" in talk.say("AbAbAb" * 30)
    talk.leave()
    talk = Talk(arguments, home, {"NO_COLOR": "1"})
    assert "\x1b[36m" not in talk.say("AbAbAb" * 30)
    talk.leave()
    assert b"\x1b" not in inside(["chat", *arguments], home, b"AbAbAb\n").out


@pytest.mark.real
def test_the_default_model_across_two_sittings(tmp_path: Path) -> None:
    """Three turns, saved, left, loaded: each turn reads only what is new."""
    places = {name: os.environ[name] for name in ("XDG_CACHE_HOME", "HF_HOME") if name in os.environ}
    arguments = ["--temperature", "0", "--max-new-tokens", "40", "--quiet"]
    settings = {"XDG_CACHE_HOME": places.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}
    questions = ["Name a river in Europe.", "Which sea does it reach?", "Name a city on it."]

    def cached(talk: Talk) -> tuple[int, int]:
        found = re.search(r"of ([\d,]+) prompt tokens ([\d,]+) were in the cache", talk.say("/stats"))
        assert found is not None
        prompt, rows = (int(number.replace(",", "")) for number in found.groups())
        return prompt, rows

    talk = Talk(arguments, tmp_path, settings)
    answers, counts = [], []
    for question in questions:
        answers.append(talk.say(question))
        counts.append(cached(talk))
    assert counts[0][1] == 0
    for prompt, rows in counts[1:]:
        assert 5 < prompt - rows < 20
    talk.say(f"/save {tmp_path}/talk")
    went_on = talk.say("Why?")
    last = cached(talk)
    assert talk.leave() == 0

    talk = Talk(arguments, tmp_path, settings)
    talk.say(f"/load {tmp_path}/talk")
    assert talk.say("Why?") == went_on
    assert cached(talk) == last
    assert talk.leave() == 0
    saved = json.loads((tmp_path / "talk").read_text())
    assert [message["content"] for message in saved["messages"] if message["role"] == "assistant"] == answers
