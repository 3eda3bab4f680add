"""A recording of the real program in a terminal, as an SVG that plays itself.

    python docs/record.py         # writes docs/recording.svg; needs pyte (the extra `docs`) and the default model

A shell runs in a pseudo-terminal; keys are pressed as a person presses them, and nothing is played faster or slower
than it was. pyte keeps the screen. Each state of a line becomes one element that CSS shows for as long as the line
stood so.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import shlex
import struct
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from xml.sax.saxutils import escape

from longspec.text.prompt_template import read

HERE = Path(__file__).resolve().parent
COLUMNS, ROWS = 92, 26
FRAME = 1 / 15  # seconds; states that last less are left out
REST = 4.0  # seconds that the last state stands before it begins again
WIDTH, HEIGHT, MARGIN = 7.83, 18, 14  # of a character, a line, the frame, in pixels; the font size is 13
COLOURS = {"default": "#d8dee9", "cyan": "#4dd0e1", "green": "#a5d6a7", "red": "#ef9a9a", "yellow": "#ffe082"}

QUESTION = read(HERE.parent / "prompts" / "demo.md").render("").strip().replace("\n", " ")
"""That of `make demo`, on one line: the default model can do it."""

SCRIPT = [  # how what is waited for ends, and what is typed then
    (rb"\$ ", "longspec chat --show-drafts --stats --stop Example\n"),
    (rb"> ", f"{QUESTION}\n"),
    (rb"ended by [^>]*> ", "Write the whole class again, with all methods, but call it Vector.\n"),
    (rb"ended by [^>]*> ", "/quit\n"),
    (rb"\$ ", ""),
]


@dataclass(frozen=True)
class State:
    """A line of the screen while it stands: runs of one colour."""

    row: int
    begins: float
    ends: float
    runs: tuple[tuple[str, str], ...]


def shell() -> tuple[int, int]:
    """A shell with `longspec` in its path: its process and the terminal's other side."""
    folder = Path(tempfile.mkdtemp())
    program = folder / "longspec"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m longspec.cli.main "$@"\n')
    program.chmod(0o755)
    child, screen = pty.fork()
    if child == 0:
        os.environ.update(
            PATH=f"{folder}{os.pathsep}{os.environ['PATH']}",
            PYTHONPATH=os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            PS1="$ ",
            TERM="xterm-256color",
            XDG_STATE_HOME=str(folder),
        )
        os.environ.pop("NO_COLOR", None)
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])  # noqa: S606, S607  the reader's own shell
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    return child, screen


def play(screen: int) -> Iterator[tuple[float, bytes]]:
    """What the terminal gets, and when: keys are pressed once what they wait for stands there."""
    began = monotonic()
    for wanted, typed in SCRIPT:
        seen = b""
        while not re.search(wanted + rb"$", seen):
            data = os.read(screen, 65536)
            seen += data
            yield monotonic() - began, data
        keys = [*typed]
        pause = 0.7  # before the first key
        while keys:
            if select.select([screen], [], [], pause)[0]:
                yield monotonic() - began, os.read(screen, 65536)
            else:
                os.write(screen, keys.pop(0).encode())
                pause = 0.35 if keys[:1] == ["\n"] else 0.045


def record() -> tuple[list[State], float]:
    """The states of all lines, and how long the recording is."""
    import pyte

    display = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(display)
    child, screen = shell()
    states: list[State] = []
    standing: dict[int, tuple[float, tuple[tuple[str, str], ...]]] = {}

    def take(now: float) -> None:
        for row in range(ROWS):
            runs = line(display, row)
            since, before = standing.get(row, (now, ()))
            if runs != before:
                if before:
                    states.append(State(row, since, now, before))
                standing[row] = (now, runs)

    taken = last = 0.0
    for now, data in play(screen):
        if now - taken >= FRAME:  # what stood until now
            take(last)
            taken = now
        stream.feed(data)
        last = now
    take(last)
    end = last + REST
    states += [State(row, since, end, runs) for row, (since, runs) in standing.items() if runs]
    os.close(screen)
    with suppress(ChildProcessError):
        os.waitpid(child, 0)
    return [state for state in states if state.ends > state.begins], end


def line(display: Any, row: int) -> tuple[tuple[str, str], ...]:
    """A row of the screen as runs of one colour."""
    cells = [display.buffer[row][column] for column in range(COLUMNS)]
    runs: list[tuple[str, str]] = []
    for cell in cells:
        colour = cell.fg if cell.fg in COLOURS and cell.data != " " else None
        if runs and colour in (runs[-1][0], None):
            runs[-1] = (runs[-1][0], runs[-1][1] + cell.data)
        else:
            runs.append((colour or "default", cell.data))
    while runs and not runs[-1][1].rstrip():
        runs.pop()
    if runs:
        runs[-1] = (runs[-1][0], runs[-1][1].rstrip())
    return tuple(runs)


def draw(states: list[State], seconds: float) -> str:
    """The states as SVG. It begins with the last state, which is also what stands where nothing is animated."""
    width, height = round(COLUMNS * WIDTH + 2 * MARGIN), ROWS * HEIGHT + 2 * MARGIN
    rules, texts = [], []
    for number, state in enumerate(states):
        begins, ends = 100 * state.begins / seconds, 100 * state.ends / seconds
        last = ends > 99.99
        rest = "" if last else f"{ends:.2f}%{{opacity:0}}"
        rules.append(f"@keyframes k{number}{{0%{{opacity:0}}{begins:.2f}%{{opacity:1}}{rest}}}")
        spans, column = [], 0
        for colour, text in state.runs:
            kind = "" if colour == "default" else f' class="{colour}"'
            spans.append(f'<tspan x="{MARGIN + column * WIDTH:.1f}"{kind}>{escape(text)}</tspan>')
            column += len(text)
        y = MARGIN + (state.row + 1) * HEIGHT - 5
        kind = ' class="last"' if last else ""
        texts.append(f'<text y="{y}"{kind} style="animation-name:k{number}">{"".join(spans)}</text>')
    style = [
        f"text{{white-space:pre;opacity:0;fill:{COLOURS['default']};"
        f"animation-duration:{seconds:.2f}s;animation-iteration-count:infinite;animation-timing-function:step-end;"
        f"animation-delay:{REST - seconds:.2f}s}}.last{{opacity:1}}",
        "@media(prefers-reduced-motion:reduce){text{animation:none}}",
        *(f".{name}{{fill:{colour}}}" for name, colour in COLOURS.items() if name != "default"),
        *rules,
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' xml:space="preserve" font-size="13"'
            ' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace">',
            "<title>longspec chat in a terminal: what came from a draft is coloured</title>",
            f"<style>{''.join(style)}</style>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#1e222a"/>',
            *texts,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the real program, as an SVG that plays itself.")
    parser.add_argument("--output", type=Path, default=HERE / "recording.svg")
    told = parser.parse_args()
    told.output.write_text(draw(*record()), encoding="utf-8")
    print(f"{told.output}: {told.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
