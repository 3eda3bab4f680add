"""A conversation: what turns share of the cache, what is kept of answers, and the command at a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND, ROOT, Terminal, call, environment, started, write_tiny
from engines import TEMPLATE, engine, tiny

import longspec.engine
from longspec.cache import CACHES
from longspec.conversation import Conversation, cache_path
from longspec.engine import Engine
from longspec.errors import UsageError
from longspec.feed import Feed
from longspec.model.load import Model
from longspec.text import Vocabulary, encode

QUESTIONS = ["AbCdEf" * 25, "what is it", "AbCdEf" * 12 + "?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def talk(made: Engine, questions: list[str], **settings: Any) -> Conversation:
    conversation = Conversation(made, system="Be", max_new_tokens=40, **settings)
    for question in questions:
        assert "".join(conversation.stream(question)) == conversation.messages[-1]["content"]
    return conversation


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of the text that each pass has fed, drafts left out."""
    counts: list[int] = []

    def run(feeds: list[Feed], decoder: Any) -> Any:
        counts.append(sum(len(feed.lacking) for feed in feeds))
        return longspec.feed.run(feeds, decoder)

    monkeypatch.setattr(longspec.engine, "run", run)
    return counts


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", CACHES)
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
            settings = environment(home, {"XDG_STATE_HOME": str(home / "state"), **(extra or {})})
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

    def leave(self, keys: str = "\x04") -> int:
        os.write(self.ours, keys.encode())
        self.until(None)
        os.close(self.ours)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def test_three_turns(tiny_folder: str, home: Path) -> None:
    talk = Talk(["-m", tiny_folder, *TINY], home)
    print(talk.said)
    print(repr(talk.say("hello")))
    print(repr(talk.say("how are you")))
    print(repr(talk.say("/stats")))
    print(repr(talk.say("/help")))
    print(talk.leave())
    assert 0
