"""The one loop that streams an answer: what is written of it, whatever ends it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from longspec.cli.io import signals
from longspec.cli.io.progress import Progress
from longspec.cli.io.stream_answer import Policy, stream
from longspec.errors import LongspecError


class Pieces:
    """A source of so many pieces; before one of them something happens."""

    is_broken = False

    def __init__(self, *pieces: tuple[str, str], before: int = -1, happens: Callable[[], None] | None = None) -> None:
        self.text = self.said = ""
        self.tokens = self.thinking = 0
        self.is_over = False
        self._pieces = list(pieces)
        self._before, self._happens = before, happens

    def advance(self, progress: Progress) -> None:
        if self._happens is not None and self.tokens == self._before:
            self._before = -1
            self._happens()
        thought, said = self._pieces[self.tokens]
        self.tokens += 1
        self.text += thought + said
        self.said += said
        self.is_over = self.tokens == len(self._pieces)

    def end(self) -> None:
        self.is_over = True


class Sink:
    is_ready, is_file = True, False

    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> None:
        self.writes.append(text)

    def end_line(self) -> None:
        if not "".join(self.writes).endswith("\n"):
            self.writes.append("\n")

    def check(self) -> None:
        pass


def interrupt() -> None:
    raise signals.Interrupted(signal.SIGINT)


def run(source: Pieces, policy: Policy) -> tuple[list[str], Any]:
    sink: Any = Sink()
    with Progress("m", quiet=True) as progress:
        interrupted = stream(source, sink, progress, policy)  # type: ignore[arg-type]
    return sink.writes, interrupted


@pytest.fixture(autouse=True)
def _no_signal_is_noted() -> Iterator[None]:
    yield
    signals.answer()


ANSWER = (("hm ", ""), ("", "so"), ("", " be it"))


def test_pieces_come_one_by_one_and_the_last_line_ends() -> None:
    assert run(Pieces(*ANSWER), Policy(stream=True, text=True)) == (["hm ", "so", " be it", "", "\n"], None)
    assert run(Pieces(*ANSWER), Policy(stream=True, text=True, hide=True)) == (["so", " be it", "", "\n"], None)


def test_an_answer_is_written_at_its_end_or_not_at_all() -> None:
    assert run(Pieces(*ANSWER), Policy(stream=False, text=True)) == (["hm so be it", "\n"], None)
    assert run(Pieces(*ANSWER), Policy(stream=False, text=False)) == ([], None)


def test_a_piece_is_painted() -> None:
    policy = Policy(stream=True, text=True, paint=str.upper)
    assert run(Pieces(("", "a"), ("", "b")), policy)[0] == ["A", "B", "", "\n"]


@pytest.mark.parametrize("streams", [True, False])
def test_a_signal_ends_it_with_what_there_is(streams: bool) -> None:
    source = Pieces(*ANSWER, before=2, happens=interrupt)
    writes, interrupted = run(source, Policy(stream=streams, text=True))
    assert "".join(writes) == "hm so\n"
    assert interrupted.exit_code == 130


def test_a_signal_in_the_midst_of_a_step_goes_up() -> None:
    source = Pieces(*ANSWER, before=1, happens=interrupt)
    source.is_broken = True
    with pytest.raises(signals.Interrupted):
        run(source, Policy(stream=True, text=True))


def test_a_second_signal_goes_up() -> None:
    class Slow(Pieces):
        def end(self) -> None:  # a server that hasn't heard it yet
            self._before, self._happens = self.tokens, interrupt

    with pytest.raises(signals.Interrupted):
        run(Slow(*ANSWER, before=1, happens=interrupt), Policy(stream=True, text=True))


def test_an_error_stands_below_what_was_written() -> None:
    def fail() -> None:
        raise LongspecError("no more")

    sink: Any = Sink()
    source: Any = Pieces(*ANSWER, before=2, happens=fail)
    with pytest.raises(LongspecError, match="no more"), Progress("m", quiet=True) as progress:
        stream(source, sink, progress, Policy(stream=True, text=True))
    assert sink.writes == ["hm ", "so", "\n"]


class Unread(Pieces):
    """A server's text that is ended while its prompt is being read."""

    ended = False

    def advance(self, progress: Progress) -> None:
        if self.ended:
            raise LongspecError("The text was ended while its prompt was being read.")
        interrupt()

    def end(self) -> None:
        self.ended = True


def test_a_signal_before_a_server_has_begun_is_what_ended_it() -> None:
    with pytest.raises(signals.Interrupted):
        run(Unread(), Policy(stream=True, text=True))
