"""`longspec run`, `chat` and `command` through a running server: the same answers, without loading a model.

Takes the options of loading and of the answer. Looks for the Unix socket of a server with the same model and
settings, and relays its answer. Imports only light parts of the standard library, as this path is about start-up
time. HTTP/1.0, whose body ends with the connection, needs no library.

The socket's path is defined here for both sides.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import stat
import struct
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from longspec import __version__
from longspec.cli.io import signals
from longspec.cli.io.output_file import OutputFile
from longspec.cli.io.page import Page
from longspec.cli.io.progress import Progress
from longspec.cli.io.stdout import Output
from longspec.cli.io.stream_answer import Policy, stream
from longspec.errors import LongspecError
from longspec.machine.system import cache_folder
from longspec.text.turns import Message, Turns

__all__ = ["SERVED", "GoneError", "Remote", "Reported", "Talk", "address", "folder", "found", "talk", "told", "write"]

SERVED = "a longspec serve with these settings answers; --no-server loads the model here"
"""What --verbose says."""

_MOST_NBYTES = 8 << 20  # the server's limit; a longer prompt is answered in this process
_PATH_NBYTES = 100  # a socket's path has at most 108 bytes on Linux, 104 on macOS
_CONNECT_SECONDS = 2.0  # for connecting, and for the server's acceptance
_LOOK_SECONDS = 1.0  # between two checks that the answer still has a reader
_END_SECONDS = 5.0
_PIECE = 1 << 16
_FILES = ("draft_model", "skip_set", "draft_from")


@dataclass(frozen=True, slots=True)
class Reported:
    """An answer reported by a server; what it has is named as in `longspec.engine.answer.Answer`."""

    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(name) from None

    def report(self) -> dict[str, Any]:
        return self.fields


def folder(*, make: bool = False) -> Path | None:
    """The sockets' folder, accessible only to this user; None where there is none, or it belongs to another user."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(base):
        path = Path(base) / "longspec"
    else:
        from tempfile import gettempdir

        path = Path(gettempdir()) / f"longspec-{os.getuid()}"
    try:
        if make:
            path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return path if mine and len(os.fsencode(path)) <= _PATH_NBYTES - 20 else None


def address(folder: Path, model: str, loading: Mapping[str, Any]) -> Path:
    """The socket's path of a server for this model, with these options and this version of longspec.

    A file or folder among the options is hashed with its path and modification time: after a change, a server has the
    old one.
    """
    names = ("HF_HOME", "HF_HUB_CACHE", "LONGSPEC_COMPILER", "LONGSPEC_ISA", "OMP_NUM_THREADS")
    description = {
        "longspec": [__version__, __file__, sys.executable],
        "cache": str(cache_folder()),
        "environment": {name: os.environ.get(name) for name in names},
        "model": _placed(model),
        "probe": _placed(str(loading.get("accept", "")).partition(":")[2]),
        "loading": {name: _placed(value) if name in _FILES else value for name, value in loading.items() if value},
    }
    digest = hashlib.blake2b(json.dumps(description, sort_keys=True).encode(errors="replace"), digest_size=8)
    return folder / digest.hexdigest()


def write(
    model: str,
    loading: Mapping[str, Any],
    prompt: str | list[Message],
    writing: Mapping[str, Any],
    output: Output | OutputFile | Page,
    progress: Progress,
    policy: Policy,
    *,
    began: float,
) -> tuple[Reported, signals.Interrupted | None] | None:
    """The answer of a running server; None, with nothing written, where none accepts the request.

    A signal ends the answer and is returned.
    """
    if writing.get("prompt_cache") is not None or (path := _usual(model, loading, writing)) is None:
        return None
    if (remote := Remote.reached(path, prompt, writing, began)) is None:
        return None
    seconds = perf_counter() - began
    with closing(remote):
        interrupted = stream(remote, output, progress, policy)
    for note in remote.notes:
        progress.say(note)
    assert remote.report is not None
    # The load time is that of connecting: this process has loaded nothing else.
    loaded = {"load_s": seconds, "tokenizer_s": 0.0, "weights_s": 0.0, "import_s": seconds}
    remote.report["timing"] = loaded | {k: v for k, v in remote.report["timing"].items() if k not in loaded}
    return Reported(remote.report), interrupted


def talk(model: str, loading: Mapping[str, Any], system: str | None, settings: dict[str, Any]) -> Talk | None:
    """A conversation with a running server; None where none is there for this model and these options."""
    path = found(model, loading, settings)
    return None if path is None else Talk(path, system, settings)


def found(model: str, loading: Mapping[str, Any], writing: Mapping[str, Any]) -> Path | None:
    """The socket of a server that is up for this model and these options; None where there is none."""
    path = _usual(model, loading, writing)
    return None if path is None or told(path, "/end", {"id": ""}) is None else path


def told(path: Path, route: str, body: Mapping[str, Any], seconds: float | None = 2.0) -> dict[str, Any] | None:
    """The object that the server there answers with; None where it gives none, or not in time."""
    if (connection := _posted(path, route, json.dumps(body).encode())) is None:
        return None
    with closing(connection), suppress(OSError, ValueError):
        connection.settimeout(seconds)
        with connection.makefile("rb") as answer:
            head, _, content = answer.read().partition(b"\r\n\r\n")
        if head.split(b" ", 2)[1:2] == [b"200"]:
            return dict(json.loads(content))
    return None


def _usual(model: str, loading: Mapping[str, Any], writing: Mapping[str, Any]) -> Path | None:
    """Where a server for this model and these options would be; None where an option concerns this process."""
    place = folder()
    # A server refuses to read special tokens where it wasn't started so.
    if place is None or loading.get("memory") is not None or writing.get("allow_special_tokens"):
        return None
    return address(place, model, loading)


class GoneError(LongspecError):
    """No server takes the question any more, or it is gone before it wrote anything."""


class Talk(Turns):
    """A conversation whose answers a running server writes. settings: options of every answer."""

    def __init__(self, path: Path, system: str | None, settings: dict[str, Any]) -> None:
        super().__init__(system)
        self.settings = settings
        self.session: Remote | None = None  # the last answer
        self._path = path
        self._asked: list[Message] = []

    def ask(self, text: str) -> Remote:
        """Begin the answer to a question. Raises GoneError."""
        return self._open(self.question(text))

    def again(self) -> Remote:
        """Begin another answer to the last question. Raises GoneError; UsageError where there is none."""
        return self._open(self.last_question())

    def keep(self) -> bool:
        """Append question and answer to the messages; no answer, no change."""
        if self.session is None or self.session.message is None:
            return False
        self.messages = [*self._asked, self.session.message]
        return True

    def answer(self) -> Reported | None:
        """The last answer; None where nothing was written yet."""
        session = self.session
        return Reported(session.report) if session is not None and session.report is not None else None

    def _open(self, messages: list[Message]) -> Remote:
        self.session = Remote.reached(self._path, messages, {**self.settings, "key": self.key}, perf_counter())
        if self.session is None:
            raise GoneError("The server takes no more questions.")
        self._asked = messages
        return self.session


class Remote:
    """An answer in progress on a server: its text so far, and at its end the report."""

    is_broken = False  # the server's state survives an interrupt here

    def __init__(self, connection: socket.socket, path: Path, name: str) -> None:
        self.text = ""
        self.said = ""  # the text without its reasoning
        self.thinking = 0  # reasoning tokens so far, until the answer begins
        self.tokens = 0
        self.notes: list[str] = []
        self.message: Message | None = None  # at its end: the answer as one of a conversation
        self.reading: tuple[int, int] | None = None  # tokens of the prompt: done, in total
        self.report: dict[str, Any] | None = None
        self._connection = connection
        self._path = path
        self._name = name
        self._seconds = _LOOK_SECONDS
        self._data = b""

    @classmethod
    def reached(
        cls, path: Path, prompt: str | list[Message], writing: Mapping[str, Any], began: float
    ) -> Remote | None:
        """Connect to the server at that path; None if it doesn't accept the request."""
        name, kind = os.urandom(8).hex(), "prompt" if isinstance(prompt, str) else "messages"
        body = json.dumps({"id": name, kind: prompt, "options": {**writing}, "began": began}).encode()
        connection = _posted(path, "/run", body) if len(body) <= _MOST_NBYTES else None
        if connection is None:
            return None
        remote = cls(connection, path, name)
        with suppress(OSError):
            while b"\r\n\r\n" not in remote._data and (data := connection.recv(_PIECE)):
                remote._data += data
            head, _, remote._data = remote._data.partition(b"\r\n\r\n")
            if head.split(b" ", 2)[1:2] == [b"200"]:
                return remote
        connection.close()
        return None

    def close(self) -> None:
        self._connection.close()

    @property
    def is_over(self) -> bool:
        return self.report is not None

    def end(self) -> None:
        """Tell the server to end the answer; the text so far still arrives."""
        self._seconds = _END_SECONDS
        connection = None if self.is_over else _posted(self._path, "/end", json.dumps({"id": self._name}).encode())
        if connection is not None:
            with suppress(OSError), closing(connection):
                connection.recv(_PIECE)

    def advance(self, progress: Progress) -> None:
        """Take the data that has arrived or arrives within a second. A signal is raised only when there is none.

        Raises LongspecError: the server's error, or a lost connection; GoneError where nothing had come of the answer.
        """
        ready = self._data or select.select([self._connection], [], [], self._seconds)[0]
        with signals.deferred():
            if not ready:
                return
            try:
                data = self._connection.recv(_PIECE) if b"\n" not in self._data else b""
            except OSError:
                data = b""
            *lines, self._data = (self._data + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            if self.reading is not None and not self.tokens:
                progress.report("reading the prompt", *self.reading)
            if not lines and not data:
                said = "The server broke off before the answer's end; ask again, or with --no-server."
                raise LongspecError(said) if self.tokens else GoneError(said)

    def _take(self, line: dict[str, Any]) -> None:
        if "error" in line:
            error = LongspecError(line["error"])
            error.exit_code = line["exit_code"]
            raise error
        if "read" in line:
            self.reading = line["read"], line["of"]
        text = line.get("text", "")
        self.text += text
        self.said += line.get("said", text)
        self.thinking = 0 if self.said else self.thinking + line.get("tokens", 0) * bool(text)
        self.tokens += line.get("tokens", 0)
        self.notes += line.get("notes", [])
        self.report, self.message = line.get("answer"), line.get("message")


def _posted(path: Path, route: str, body: bytes) -> socket.socket | None:
    """A connection over which the body was sent; None where no server of this user listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_CONNECT_SECONDS)
    head = f"POST {route} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        connection.connect(str(path))
        if _is_mine(connection):
            connection.sendall(head.encode() + body)
            return connection
    except OSError:
        pass
    except BaseException:  # a signal
        connection.close()
        raise
    connection.close()
    return None


def _is_mine(connection: socket.socket) -> bool:
    """Whether the peer is this user's process: Linux tells; elsewhere the folder's mode must suffice."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.getuid())


def _placed(name: object) -> object:
    """A file with its time and size, a folder with those of its files; any other name unchanged."""
    if isinstance(name, list | tuple):
        return [_placed(each) for each in name]
    path = os.path.expanduser(str(name))
    try:
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                files = sorted((entry.name, _stamp(entry.stat())) for entry in entries if entry.is_file())
            return [os.path.realpath(path), files]
        return [os.path.realpath(path), _stamp(os.stat(path))]
    except OSError:
        return str(name)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_size
