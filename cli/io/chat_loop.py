"""The loop of a conversation: messages are answered, lines that begin with / are commands.

Takes lines; answers are streamed to standard output, everything else goes to stderr. Commands are for terminals: a
line from a pipe is always a message.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from longspec.cli.io import signals
from longspec.cli.io.colour import coloured
from longspec.cli.io.line_editor import PipedLines, TypedLines
from longspec.cli.io.page import Page
from longspec.cli.io.progress import Progress, printable
from longspec.cli.io.server_client import GoneError, Remote, Talk
from longspec.cli.io.stdout import Output
from longspec.cli.io.stream_answer import UNSAID, Local, Policy, statistics, stream, unsaid
from longspec.errors import LongspecError, UsageError

if TYPE_CHECKING:
    from longspec.engine.conversation import Conversation
    from longspec.engine.engine import Engine
    from longspec.engine.session import Session

__all__ = ["COMMANDS", "Dialogue", "short_name"]

COMMANDS = {
    "/help": "this list",
    "/system TEXT": "the system message from here on; without a text, none",
    "/reset": "forget all that was said (/clear does the same)",
    "/retry": "another answer to the last question (the same one, if nothing is sampled)",
    "/save FILE": "keep the conversation in FILE and its cache in FILE.cache",
    "/load FILE": "go on with a saved conversation, and its settings",
    "/model NAME": "go on with another model",
    "/stats": "how the last answer was written, and what the cache holds",
    "/quit": "end (/exit, exit and Ctrl-D do the same)",
}
_OTHER_NAMES = {"/clear": "/reset", "/exit": "/quit", "exit": "/quit", "quit": "/quit", "?": "/help", "help": "/help"}
_HELP = """A line is a message. Alt-Enter begins another line in it, \"\"\" begins and ends a message of several
lines, and what is pasted stays one message. A message that begins with /, or is only ? or exit, is written with a
space before it.
Ctrl-C stops an answer, whose beginning stays in the conversation; at the prompt it begins the line anew."""


class Dialogue:
    """The loop over a user's messages. load: a function from a model's name to its engine; a conversation with a server
    goes on with that of `model` where it needs an engine, or the server is gone.
    """

    def __init__(
        self,
        conversation: Conversation | Talk,
        lines: TypedLines | PipedLines,
        progress: Progress,
        load: Callable[[str], Engine],
        model: str,
        *,
        output: Output | Page,
        colours: bool,
        stats: bool,
        hide: bool = False,
    ) -> None:
        self.conversation = conversation
        self.lines = lines
        self.output = output
        self.progress = progress
        self.load = load
        self.model = model
        self.colours = colours
        self.stats = stats
        self.hide = hide  # hide the reasoning

    def hold(self) -> None:
        """Answer until the end of input.

        Raises:
            Interrupted: SIGTERM, or SIGINT without a terminal to continue at.
            LongspecError: as `Engine.open` and `Engine.step`; at a terminal it is printed, and the conversation
            continues.
        """
        typed = isinstance(self.lines, TypedLines)
        while True:
            try:
                text = self.lines.read()
                if text is None:
                    break
                if not text.strip():
                    continue
                if isinstance(self.lines, TypedLines):
                    self.lines.remember(text)
                if typed:
                    text = _OTHER_NAMES.get(text.strip() if not text.startswith(" ") else text, text)
                if not typed or not text.startswith("/"):
                    self._answer(lambda text=text: self.conversation.ask(text.strip() if typed else text))  # type: ignore[misc]
                elif text.strip() == "/quit":
                    return
                else:
                    self._command(text.strip())
            except signals.Interrupted as end:
                self.progress.stop()
                if not typed or end.signum != signal.SIGINT:
                    raise
                signals.answer()
                self.output.write("\n")
            except LongspecError as error:
                self.progress.stop()
                if not typed:
                    raise
                self._tell(f"longspec: {error}")
        if typed:
            self.output.write("\n")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        command = next((usage for usage in COMMANDS if usage.split()[0] == name), None)
        if command is None:
            raise UsageError(f"{name} is no command; /help lists them, and a space before the / makes it a message.")
        if (" " in command) < bool(argument) or (command.endswith(("FILE", "NAME")) and not argument):
            raise UsageError(f"{line.partition(' ')[0]} takes {command.partition(' ')[2] or 'nothing'}: {command}.")
        getattr(self, f"_{name[1:]}")(*[argument] * (" " in command))

    def _help(self) -> None:
        self._tell(_HELP)
        self._tell("\n".join(f"  {usage:<14}{what}" for usage, what in COMMANDS.items()))

    def _system(self, text: str) -> None:
        self.conversation.system = text or None
        self._tell("the system message is set" if text else "there is no system message from here on")

    def _reset(self) -> None:
        self.conversation.reset()
        kept = "; the system message stays" if self.conversation.system is not None else ""
        self._tell(f"all that was said is forgotten{kept}")

    def _retry(self) -> None:
        self._answer(lambda: self.conversation.again())

    def _here(self) -> Conversation:
        """The conversation, with an engine in this process."""
        if isinstance(talk := self.conversation, Talk):
            engine = self.load(self.model)
            self.progress.stop()
            self.conversation = conversation_with(engine, talk)
            return self.conversation
        return talk

    def _save(self, name: str) -> None:
        path, conversation = os.path.expanduser(name), self._here()
        with signals.deferred():
            conversation.save(path)
        self._tell(f"saved {_count(self.conversation.turns, 'turn')} in {path}")

    def _load(self, name: str) -> None:
        path, before = os.path.expanduser(name), self._here()
        allowed = before.settings.get("allow_special_tokens", False)
        self.conversation = loaded = type(before).load(before.engine, path, allow_special_tokens=allowed)
        session = loaded.session
        rows = _count(session.cached if session is not None else 0, "token")
        self._tell(f"{_count(self.conversation.turns, 'turn')} from {path}, {rows} of it in the cache")
        for note in loaded.notes:
            self._tell(note)

    def _model(self, name: str) -> None:
        engine = self.load(name)
        self.progress.stop()
        self.model = name
        if isinstance(talk := self.conversation, Talk):
            self.conversation = conversation_with(engine, talk)
        else:
            talk.move(engine)
        self._tell(f"going on with {short_name(engine.model.name)}, which reads the conversation with the next message")

    def _stats(self) -> None:
        if (answer := self.conversation.answer()) is None:
            self._tell("no answer was written yet")
            return
        usage, nbytes = answer.usage, answer.memory["cache_bytes"]
        self._tell(statistics(answer))
        self._tell(
            f"{_count(self.conversation.turns, 'turn')}; of {_count(usage['prompt_tokens'], 'prompt token')} "
            f"{usage['cached_tokens']:,} were in the cache; it is {answer.cache}, of {nbytes / 1e6:,.1f} MB"
        )

    def _answer(self, opening: Callable[[], Session | Remote]) -> None:
        """Write an answer to its end, or to a signal, and keep what was written."""
        try:
            session, interrupted = self._written(opening)
        except GoneError:
            self.progress.say("the server takes no more questions; the model is loaded here")
            self._here()
            session, interrupted = self._written(opening)
        kept = self.conversation.keep()
        for note in session.notes:
            self.progress.say(note)
        answer = self.conversation.answer()
        if self.hide and answer is not None and unsaid(answer):
            self.progress.say(UNSAID)
        if answer is not None and answer.finish_reason == "length" and not isinstance(self.lines, PipedLines):
            count = f"{_count(answer.usage['completion_tokens'], 'token')}"
            self.progress.say(
                f"the answer was cut after {count}; --max-new-tokens allows more, and asking to go on continues it"
            )
        if interrupted is None:
            if self.stats and answer is not None:
                self.progress.say(statistics(answer))
            return
        if interrupted.signum != signal.SIGINT or isinstance(self.lines, PipedLines):
            raise interrupted
        self.progress.say(
            "stopped; what was written stays in the conversation, and /retry writes another answer"
            if kept
            else "stopped before anything was written; the conversation is as it was"
        )

    def _written(self, opening: Callable[[], Session | Remote]) -> tuple[Session | Remote, signals.Interrupted | None]:
        session = opening()
        try:
            return session, self._write(session)
        except BaseException:
            self.conversation.session = None  # its cache may hold half a step
            raise

    def _write(self, session: Session | Remote) -> signals.Interrupted | None:
        """Write the session to its end, or to a signal, which is returned. Its text so far is on stdout then.

        A signal is raised between steps; a second one within a step propagates.
        """
        if isinstance(session, Remote):
            with closing(session):
                return stream(session, self.output, self.progress, Policy(stream=True, text=True, hide=self.hide))
        source = Local(self._here().engine, session, resumable=True)

        def paint(text: str) -> str:
            begin = len(session.text) - len(text)  # the newest part of the session's text
            return coloured(text, begin, session.begins, source.accepted)

        policy = Policy(stream=True, text=True, hide=self.hide, paint=paint if self.colours else None)
        return stream(source, self.output, self.progress, policy)

    def _tell(self, text: str) -> None:
        """Print a command's output or an error, with --quiet too, without control characters."""
        if sys.stderr is not None:
            with suppress(OSError):
                print(printable(text, keep="\n"), file=sys.stderr, flush=True)


def conversation_with(engine: Engine, talk: Talk) -> Conversation:
    """A server's conversation, to be gone on with by an engine."""
    from longspec.engine.conversation import Conversation

    made = Conversation(engine, **talk.settings)
    made.messages = talk.messages
    return made


def short_name(model: str) -> str:
    """A model's name without the folders before it."""
    return os.path.basename(model.rstrip("/")) if os.path.exists(model) else model


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
