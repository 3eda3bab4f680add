"""A conversation: its messages, and the session whose KV cache is reused from turn to turn.

Takes an engine and the user's messages; gives sessions to be decoded, and keeps their answers. Every turn renders all
messages with the chat template and prefills only the tokens that the last session's cache lacks. An answer keeps its
own tokens where the template repeats its text unchanged; else that text is tokenized and prefilled again.

A saved conversation is a JSON file with the messages and the settings, and beside it a snapshot of the cache. The
file isn't trusted: sizes and types are checked, and the snapshot is used only for the tokens that the messages give.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from longspec.engine.answer import Answer
from longspec.engine.engine import Engine
from longspec.engine.options import Options, asked
from longspec.engine.session import Session
from longspec.errors import LongspecError, UsageError
from longspec.machine.files import read_json, replaced
from longspec.sampling.parameters import PARAMETERS, Sampling
from longspec.text.reasoning_effort import EFFORTS
from longspec.text.tokenizer import Vocabulary
from longspec.text.turns import Message, Turns

__all__ = ["Conversation", "cache_path", "message_of"]

_VERSION = 1
_MOST_NBYTES = 64 << 20


class Conversation(Turns):
    """The messages so far. `settings`: options of every answer, as `Engine.open` takes them.

    conversation = Conversation(engine, system="Be brief.", max_new_tokens=200)
    print(*conversation.stream("Why is the sky blue?"), sep="")
    print(*conversation.stream("And at sunset?"), sep="")
    """

    def __init__(self, engine: Engine, *, system: str | None = None, **settings: Any) -> None:
        super().__init__(system)
        self.engine = engine
        self.settings: dict[str, Any] = settings  # fields of `Options`
        self.session: Session | None = None  # the last one; the next takes its cache
        self.notes: list[str] = []  # messages for the user, such as why a cache wasn't used
        self._asked: list[Message] = []  # the messages that the session answers, the question last
        _sampling(engine, self.settings)

    def ask(self, text: str) -> Session:
        """Open a session for the answer to a question; `keep` then appends question and answer to the messages.

        Raises:
            UsageError: the question can't be asked, as `Engine.open` says.
        """
        return self._open(self.question(text))

    def again(self) -> Session:
        """Open a session for another answer to the last question; with sampling, it differs from the first one.

        Raises:
            UsageError: there is no question yet.
        """
        return self._open(self.last_question())

    def keep(self) -> bool:
        """Append the session's question and answer to the messages, interrupting it if it isn't over; no answer, no
        change.
        """
        session = self.session
        if session is None:
            raise UsageError("Nothing was asked yet, so there is no answer to keep; ask something first.")
        if session.finish_reason is None:
            session.interrupt()
        if (message := message_of(session, self.engine.model.vocabulary)) is None:
            return False
        self.messages = [*self._asked, message]
        return True

    def answer(self) -> Answer | None:
        """The last answer with its figures; None where nothing was written yet."""
        session = self.session
        return None if session is None or session.first_token is None else self.engine.answer(session)

    def stream(self, text: str) -> Iterator[str]:
        """Ask a question and yield the answer's text; the written part is kept, even if the
        iterator is closed early.
        """
        session = self.ask(text)
        try:
            for commit in self.engine.write(session):
                if commit.text:
                    yield commit.text
        finally:
            self.keep()

    def move(self, engine: Engine) -> None:
        """Continue with another model, which prefills the messages again.

        Raises:
            UsageError: the settings make no sense with it.
        """
        _sampling(engine, self.settings)
        self.engine, self.session = engine, None

    def save(self, path: str | Path) -> None:
        """Write the messages, and the cache beside them. Each file is replaced atomically.

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
    def load(cls, engine: Engine, path: str | Path, *, allow_special_tokens: bool = False) -> Conversation:
        """Read a saved conversation, with its cached rows if this model made them; else `notes` says why not.

        allow_special_tokens: as an option of answers. No file can set it.

        Raises:
            UsageError: the file can't be read, or isn't a conversation.
        """
        saved = _read(Path(path))
        allowed: dict[str, Any] = {"allow_special_tokens": True} if allow_special_tokens else {}
        made = cls(engine, **saved["settings"], **allowed)
        made.messages = saved["messages"]
        if saved["model"] != engine.model.name:
            made.notes.append(f"it was held with {saved['model']}, and goes on with {engine.model.name}")
        cache = cache_path(Path(os.path.realpath(path)))
        if made.turns and cache.exists():
            try:
                session = engine.open(made.messages, prompt_cache=cache, **made.settings)
                session.prompt_cache = None  # the snapshot is read, not written
                session.interrupt()
                made.session = session
            except UsageError as error:
                made.notes.append(f"its cache isn't used, so that the next turn reads it anew: {error}")
        return made

    def _open(self, messages: list[Message]) -> Session:
        after = self.session
        if after is not None and after.finish_reason is None:  # ended by an error: the cache's state is unknown
            after = None
        session = self.engine.open(messages, after=after, key=self.key, **self.settings)
        self.session, self._asked = session, messages
        return session


def message_of(session: Session, vocabulary: Vocabulary) -> Message | None:
    """An answer as a message, with the tokens that were written; None where it was ended before there was one."""
    if session.finish_reason == "interrupted" and not session.text:
        return None
    # gpt-oss's template writes the channels itself, and refuses texts that have them.
    if vocabulary.markers is not None and vocabulary.markers.lead:
        return {"role": "assistant", "content": session.said}
    ended = session.answer and session.answer[-1] in session.end_tokens
    tokens = session.answer[:-1] if ended else session.answer
    return {"role": "assistant", "content": session.text, "tokens": tokens}


def cache_path(path: Path) -> Path:
    """The path of a saved conversation's cache."""
    return path.with_name(path.name + ".cache")


def _sampling(engine: Engine, settings: dict[str, Any]) -> None:
    """Raise UsageError where these settings aren't valid for the engine's model."""
    Sampling.over(engine.model.defaults, asked(cast(Options, settings)))


def _check_ours(place: Path, beginning: bytes) -> None:
    """Raise UsageError where saving would overwrite a file that longspec didn't write."""
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
    """A file's conversation, with every value's type checked. UsageError where one is wrong."""
    saved = read_json(path, _MOST_NBYTES, "The conversation", hint="name a file that /save has written")
    if saved.get("longspec_conversation") != _VERSION:
        raise UsageError(f"{path} isn't a conversation of version {_VERSION}; name a file that /save has written.")
    wrong = _wrong(saved)
    if wrong is not None:
        raise UsageError(f"{path} can't be a saved conversation: {wrong}.")
    return {name: saved[name] for name in ("model", "settings", "messages")}


def _wrong(saved: dict[str, Any]) -> str | None:
    """The reason why a file's values are invalid; None where they are valid."""
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
    """Whether the value is a string of valid Unicode (no lone surrogates)."""
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
