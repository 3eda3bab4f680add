"""Answers at a terminal of some widths: no word is split, nothing is lost, and blocks are drawn once they are whole."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from time import sleep

import pyte
import pytest

from longspec.cli.io.page import Page, rendered
from longspec.cli.io.progress import folded
from longspec.cli.io.stdout import Output

ANSWER = """# Rivers

The **Danube** flows through ten countries, and reaches the Black Sea behind a delta of some thousand square kilometres.
Its name is older than most languages that are spoken beside it; 多瑙河 is what it is called in Chinese.

1. Source: the Black Forest, where two brooks meet
2. Mouth: the Black Sea

```python
def length(river):
    return {"Danube": 2850}[river]  # kilometres
```

- `Volga` is longer, by a few hundred kilometres, and never leaves its country
- Rhine

Averyveryverylongwordthatnothingcanbreakandthatnoscreenofordinarywidthhasroomforatall is a word too.
"""


class Screen:
    """A pseudo-terminal in the place of standard output, and what stands on it."""

    def __init__(self, columns: int, rows: int) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self.stream = pyte.ByteStream(self.screen)
        self.ours, self.theirs = pty.openpty()
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def feed(self) -> None:
        while True:
            try:
                data = os.read(self.ours, 4096)
            except OSError:  # the last writer has closed
                return
            if not data:
                return
            self.stream.feed(data)

    @property
    def rows(self) -> list[str]:
        above = ["".join(row[column].data for column in range(self.screen.columns)) for row in self.screen.history.top]
        return [row.rstrip() for row in [*above, *self.screen.display]]


@contextmanager
def shown(columns: int, rows: int) -> Iterator[Screen]:
    screen, before = Screen(columns, rows), os.dup(1)
    os.dup2(screen.theirs, 1)
    reader = Thread(target=screen.feed)
    reader.start()
    try:
        yield screen
    finally:
        termios.tcdrain(1)
        os.dup2(before, 1)
        os.close(before)
        os.close(screen.theirs)
        reader.join(10)
        os.close(screen.ours)


def pieces(text: str, seed: int) -> Iterator[str]:
    """The text as a model gives it."""
    draw, at = random.Random(seed), 0
    while at < len(text):
        size = draw.randint(1, 9)
        yield text[at : at + size]
        at += size


def words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"```\w*|^\d\. ", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "wrapped"])
@pytest.mark.parametrize("rows", [60, 8])
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_nothing_is_split_and_nothing_lost(columns: int, rows: int, drawn: bool) -> None:
    with shown(columns, rows) as screen:
        written = Page(Output(), rendered=drawn)
        for piece in pieces(ANSWER, columns):
            written.write(piece)
        written.end_line()
    seen = screen.rows
    long = max(words(ANSWER), key=len)
    assert long in "".join(seen)
    for word in words(ANSWER):
        assert word == long or any(word in row for row in seen), word
    joined = "".join(words(" ".join(re.sub(r"^ *\d +|^ • ", "", row) for row in seen))).replace(" ", "")
    for word in words(ANSWER)[:20]:
        assert joined.count(word) >= 1
    if drawn and rows == 60:
        assert not any("**" in row or "```" in row or row.startswith("# ") for row in seen)
        assert any(row == "def length(river):" for row in seen)
        assert joined.count("Danube") == 2  # drawn in the place of what was there
    if not drawn:
        assert any("**Danube**" in row for row in seen)


def test_a_resized_terminal_keeps_what_it_has() -> None:
    with shown(80, 60) as screen:
        written = Page(Output(), rendered=True)
        begin, end = ANSWER[:120], ANSWER[120:]
        written.write(begin)
        while not any("**Danube**" in row for row in screen.rows):
            sleep(0.001)
        screen.resize(120, 60)
        for piece in pieces(end, 3):
            written.write(piece)
        written.end_line()
    seen = screen.rows
    assert any("**Danube**" in row for row in seen)  # its block was under way, and stays as it was written
    assert any(row == "def length(river):" for row in seen)
    for word in words(ANSWER)[:-1]:
        assert any(word in row for row in seen), word


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_messages_are_wrapped_at_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "longspec: 7,938 tokens in 15.9 s (499.6 tokens/s), acceptance 1.00, first token after 0.0 s, ended by length"
    )
    assert folded(said) == said
    monkeypatch.setattr("os.isatty", lambda number: number == 2)
    monkeypatch.setattr("os.get_terminal_size", lambda number: os.terminal_size((columns, 24)))
    lines = folded(said).splitlines()
    assert max(map(len, lines)) <= columns
    assert " ".join(lines) == said


def test_code_is_as_it_was_written() -> None:
    code = "x = 1\n\n    deep = [" + ", ".join(map(str, range(60))) + "]\n"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", rendered(f"```python\n{code}```\n", 40))
    assert plain == code
