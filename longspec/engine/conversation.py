"""A conversation: its messages, and the session whose cache goes on from turn to turn.

Takes an engine and what a person says; gives sessions to be written, and keeps what became of them. Every turn is the
template's rendering of all messages, and only what the last session's cache lacks of it is prefilled. The answers'
own tokens are kept, where the template repeats their text as it was; else that text is tokenised, and read, again.

Saved, it is a JSON file with the messages and how they are answered, and beside it the cache. A file is anybody's:
sizes and types are checked, and the cache counts only for the tokens that the messages give.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from longspec.engine.engine import Engine
from longspec.engine.options import Options, asked
from longspec.engine.session import Session
from longspec.errors import LongspecError, UsageError
from longspec.machine.files import read_json, replaced
from longspec.sampling.parameters import PARAMETERS, Sampling
from longspec.text.reasoning_effort import EFFORTS

__all__ = ["Conversation", "cache_path"]

Message = dict[str, Any]

_VERSION = 1
_MOST_NBYTES = 64 << 20


class Conversation:
    """What was said so far. `settings` are how each answer is written, as `Engine.open` takes them.

    conversation = Conversation(engine, system="Be brief.", max_new_tokens=200)
    print(*conversation.stream("Why is the sky blue?"), sep="")
    print(*conversation.stream("And at sunset?"), sep="")
    """

    def __init__(self, engine: Engine, *, system: str | None = None, **settings: Any) -> None:
        self.engine = engine
        self.settings: dict[str, Any] = settings  # of Options
        self.messages: list[Message] = []
        self.session: Session | None = None  # the last one; the next takes its cache
        self.notes: list[str] = []  # what happened on the way, for people
        self._asked: list[Message] = []  # the messages that the session answers
        self._attempt = 0
        self.system = system
        _sampling(engine, self.settings)

    @property
    def system(self) -> str | None:
        """The system message; setting it, or None, leaves the others as they are."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *others] if text else others

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def ask(self, text: str) -> Session:
        """A session that is to write the answer; `keep` puts question and answer among the messages.

        Raises:
            UsageError: the text can't be asked, as `Engine.open` says.
        """
        self._attempt = 0
        return self._open([*self.messages, {"role": "user", "content": text}])

    def again(self) -> Session:
        """As `ask`, for another answer to the last question; a sampled one comes out differently.

        Raises:
            UsageError: nothing was asked yet.
        """
        if not self.turns:
            raise UsageError("Nothing was asked yet, so there is no answer to write again; ask something first.")
        self._attempt += 1
        return self._open(self.messages[:-1])

    def keep(self) -> bool:
        """Take what the session wrote; one that isn't over ends here. Where it wrote nothing, nothing is kept."""
        session = self.session
        if session is None:
            raise UsageError("Nothing was asked yet, so there is no answer to keep; ask something first.")
        if session.finish_reason is None:
            session.interrupt()
        if session.finish_reason == "interrupted" and not session.text:
            return False
        ends = self.engine.model.end_tokens
        tokens = session.answer[:-1] if session.answer and session.answer[-1] in ends else session.answer
        self.messages = [*self._asked, {"role": "assistant", "content": session.text, "tokens": tokens}]
        return True

    def stream(self, text: str) -> Iterator[str]:
        """Ask, and give the answer's text as it becomes certain; what was written is kept, however it ends."""
        session = self.ask(text)
        try:
            for commit in self.engine.write(session):
                if commit.text:
                    yield commit.text
        finally:
            self.keep()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = self.messages[: int(self.system is not None)]

    def move(self, engine: Engine) -> None:
        """Go on with another model, which reads the messages anew.

        Raises:
            UsageError: the settings make no sense with it.
        """
        _sampling(engine, self.settings)
        self.engine, self.session = engine, None

    def save(self, path: str | Path) -> None:
        """Write the messages, and the cache beside them. What was there is replaced by a whole file or stays.

        Raises:
            LongspecError: it can't be written.
        """
        place = Path(os.path.realpath(path))
        settings = {name: value for name, value in self.settings.items() if name in _KNOWN and value is not None}
        whole = {
            "longspec_conversation": _VERSION,
            "model": self.engine.model.name,
            "settings": settings,
            "messages": self.messages,
        }
        _check_ours(place, b'{\n "longspec_conversation":')
        _check_ours(cache_path(place), b"longspec")
        if self.session is not None and self.session.cache.length:
            self.engine.save(self.session, cache_path(place))
        else:
            with suppress(OSError):
                cache_path(place).unlink(missing_ok=True)
        try:
            text = json.dumps(whole, ensure_ascii=False, indent=1) + "\n"
            replaced(place, lambda path: path.write_text(text, encoding="utf-8"), private=True)
        except OSError as error:
            raise LongspecError(f"The conversation {path} can't be written: {error.strerror or error}.") from error

    @classmethod
    def load(cls, engine: Engine, path: str | Path) -> Conversation:
        """A saved conversation, with the rows of its cache where they are this model's; else `notes` says why not.

        Raises:
            UsageError: the file can't be read, or isn't a conversation.
        """
        saved = _read(Path(path))
        made = cls(engine, **saved["settings"])
        made.messages = saved["messages"]
        if saved["model"] != engine.model.name:
            made.notes.append(f"it was held with {saved['model']}, and goes on with {engine.model.name}")
        cache = cache_path(Path(os.path.realpath(path)))
        if made.turns and cache.exists():
            try:
                session = engine.open(made.messages, prompt_cache=cache, **made.settings)
                session.prompt_cache = None  # reading it is all that is wanted
                session.interrupt()
                made.session = session
            except UsageError as error:
                made.notes.append(f"its cache isn't used, so that the next turn reads it anew: {error}")
        return made

    def _open(self, messages: list[Message]) -> Session:
        key = f"retry {self._attempt}" if self._attempt else ""
        after = self.session
        if after is not None and after.finish_reason is None:  # an error ended it, and nobody knows where
            after = None
        session = self.engine.open(messages, after=after, key=key, **self.settings)
        self.session, self._asked = session, messages
        return session


def cache_path(path: Path) -> Path:
    """Where the cache of a saved conversation lies."""
    return path.with_name(path.name + ".cache")


def _sampling(engine: Engine, settings: dict[str, Any]) -> None:
    """Raises UsageError where these can't be this model's settings."""
    Sampling.over(engine.model.defaults, asked(cast(Options, settings)))


def _check_ours(place: Path, beginning: bytes) -> None:
    """Raises UsageError where a file would be lost that wasn't saved by us."""
    try:
        with place.open("rb") as file:
            ours = place.is_file() and file.read(len(beginning)) == beginning
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{place} can't be replaced: {error.strerror or error}; name another file.") from error
    if not ours:
        raise UsageError(f"{place} is there, and isn't a saved conversation; name another file.")


def _read(path: Path) -> dict[str, Any]:
    """A file's conversation, every value of the type that it should have. UsageError where it isn't."""
    saved = read_json(path, _MOST_NBYTES, "The conversation", hint="name a file that /save has written")
    if saved.get("longspec_conversation") != _VERSION:
        raise UsageError(f"{path} isn't a conversation of version {_VERSION}; name a file that /save has written.")
    wrong = _wrong(saved)
    if wrong is not None:
        raise UsageError(f"{path} can't be a saved conversation: {wrong}.")
    return {name: saved[name] for name in ("model", "settings", "messages")}


def _wrong(saved: dict[str, Any]) -> str | None:
    """What is wrong with a file's values; None where nothing is."""
    settings, messages = saved.get("settings"), saved.get("messages")
    if not _is_text(saved.get("model")):
        return "its model isn't a name"
    if not isinstance(settings, dict):
        return "its settings aren't a table"
    for name, value in settings.items():
        if name not in _KNOWN or not _KNOWN[name](value):
            return f"its setting {name!r:.40} is unknown, or {value!r:.40} is nothing that it may be"
    if not isinstance(messages, list):
        return "its messages aren't a list"
    system = int(bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system")
    for i, message in enumerate(messages):
        role = "system" if i < system else ("user", "assistant")[(i - system) % 2]
        if not isinstance(message, dict) or message.get("role") != role or not _is_text(message.get("content")):
            return f"message {i} should be a text of the {role}"
        if not message.keys() <= {"role", "content", "tokens"} or ("tokens" in message and role != "assistant"):
            return f"message {i} has what no message of the {role} has"
        tokens = message.get("tokens", [])
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
            return f"message {i} has tokens that are none"
    return "its last question has no answer" if (len(messages) - system) % 2 else None


def _is_text(value: object) -> bool:
    """A string that is valid Unicode."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_whole(value: object) -> bool:
    return type(value) is int and abs(value) < 1 << 63


_KNOWN: dict[str, Any] = {
    **{name: _is_whole if bounds.kind is int else _is_number for name, bounds in PARAMETERS.items()},
    "max_new_tokens": lambda value: _is_whole(value) and value > 0,
    "reasoning_budget": lambda value: _is_whole(value) and value >= 0,
    "effort": lambda value: value in EFFORTS,
    "stop_loops": lambda value: isinstance(value, bool),
    "stop": lambda value: (
        isinstance(value, list) and len(value) < 100 and all(_is_text(text) and text for text in value)
    ),
}
