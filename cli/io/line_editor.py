"""The user's messages: edited with a history at a terminal, line by line from a pipe.

Takes standard input; gives messages without their line end. At a terminal Python's own readline edits (GNU readline
or libedit, as Python was built): it needs no package, starts in a millisecond, and restores the terminal when a
signal ends it. Without readline, lines are read as the terminal sends them.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from longspec.errors import UsageError
from longspec.machine.files import replaced
from longspec.machine.system import state_folder

__all__ = ["PipedLines", "TypedLines", "history_path"]

_QUOTES = '"""'
_MOST_NBYTES = 64 << 20
_HISTORY_ENTRIES = 1000
_HISTORY_NBYTES = 1 << 20
_ENTRY_LENGTH = 10_000  # characters; longer messages were pasted, and aren't kept


class PipedLines:
    """Lines of standard input, each a message; empty ones are left out."""

    def read(self) -> str | None:
        """The next message; None at the end.

        Raises:
            UsageError: a line isn't valid UTF-8, or is too long for any model.
        """
        if sys.stdin is None:
            return None
        while data := sys.stdin.buffer.readline(_MOST_NBYTES + 1):
            if len(data) > _MOST_NBYTES:
                raise UsageError(f"A line of standard input holds more than {_MOST_NBYTES >> 20} MiB; end it sooner.")
            try:
                text = data.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UsageError(f"Standard input isn't text: {error.reason}; give text in UTF-8.") from None
            if "\0" in text:
                raise UsageError("Standard input isn't text: it holds a NUL; give text in UTF-8.")
            if text.strip():
                return text
        return None


class TypedLines:
    """Messages typed at a terminal, with a history on the arrow keys."""

    def __init__(self, prompt: str, commands: Sequence[str]) -> None:
        self._prompt = prompt
        self._commands = commands
        self._history = _read_history()
        self._readline = _readline()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        if self._readline is not None:
            self._prepare(self._readline)

    def read(self) -> str | None:
        """The next message, of several lines if pasted or between triple quotes; None at the end."""
        line = self._line(self._prompt)
        if line is None or not line.startswith(_QUOTES):
            return line
        lines = [line.removeprefix(_QUOTES)]
        while not lines[-1].rstrip().endswith(_QUOTES):
            more = self._line("." * (len(self._prompt) - 1) + " ")
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines).rstrip().removesuffix(_QUOTES).strip("\n")

    def remember(self, text: str) -> None:
        """Add a message to the history and to its file, which only the user can read."""
        if len(text) > _ENTRY_LENGTH or (self._history and self._history[-1] == text):
            return
        self._history = [*self._history, text][-_HISTORY_ENTRIES:]
        if self._readline is not None:
            self._readline.add_history(text)
        with suppress(OSError):  # the history file is optional
            _write_history(self._history)

    def _line(self, prompt: str) -> str | None:
        if not os.isatty(1):  # input() would write its prompt between the answers
            if sys.stderr is not None:
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline(_MOST_NBYTES)
            return line.rstrip("\r\n") if line else None
        try:
            with _woken():
                return input(prompt)
        except EOFError:
            return None

    def _prepare(self, readline: ModuleType) -> None:
        readline.set_auto_history(False)
        readline.clear_history()
        for entry in self._history:
            readline.add_history(entry)
        readline.set_completer_delims("")
        readline.set_completer(self._complete)
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
            return
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Enter: a line end in the message

    def _complete(self, text: str, state: int) -> str | None:
        fitting = [name for name in self._commands if text.startswith("/") and name.startswith(text)]
        return fitting[state] if state < len(fitting) else None


@contextmanager
def quiet_keys() -> Iterator[None]:
    """Within the block, a terminal prints no key that is typed into the text, Ctrl-C neither; the next line read has
    them. In the background nothing is changed: the system would stop a process that tries.
    """
    if sys.stdin is None or not os.isatty(0) or os.tcgetpgrp(0) != os.getpgrp():
        yield
        return
    import termios

    before = termios.tcgetattr(0)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(0, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(OSError, termios.error):  # the terminal may be gone
            termios.tcsetattr(0, termios.TCSANOW, before)


@contextmanager
def _woken() -> Iterator[None]:
    """Within the block, a signal interrupts the main thread's wait for a key, whichever thread receives it.

    The system may deliver a signal to one of torch's threads; readline would then wait for the next key.
    """
    ours, told = socket.socketpair()
    told.setblocking(False)
    over, main = threading.Event(), threading.main_thread().ident

    def pass_on() -> None:
        while (number := ours.recv(1)) and main is not None:
            if not over.wait(0.05):  # the main thread hasn't handled it yet
                signal.pthread_kill(main, number[0])

    before = signal.set_wakeup_fd(told.fileno())
    watch = threading.Thread(target=pass_on, daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        told.close()
        watch.join(1)
        ours.close()


def history_path() -> Path:
    """The history file: one JSON string per line."""
    return state_folder() / "history"


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline


def _read_history() -> list[str]:
    """The valid entries of the history file, which isn't trusted."""
    try:
        with history_path().open("rb") as file:
            lines = file.read(_HISTORY_NBYTES).decode(errors="replace").splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, str) and "\0" not in entry:
                entries.append(entry)
    return entries[-_HISTORY_ENTRIES:]


def _write_history(entries: Sequence[str]) -> None:
    lines = [json.dumps(entry) + "\n" for entry in entries]
    while sum(map(len, lines)) > _HISTORY_NBYTES:
        del lines[: 1 + len(lines) // 10]
    place = history_path()
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replaced(place, lambda path: path.write_text("".join(lines), encoding="ascii"), private=True)
