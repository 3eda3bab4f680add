"""An answer at a terminal: words wrapped at the edge, and each block of Markdown rendered once it is whole.

Takes text as it is written; writes through `Output`. A block (a paragraph, a list, a table, a fence of code) is shown
as it comes, word by word, and drawn again by rich at its end. Nothing is drawn again that has left the screen, or after
the screen's size has changed: then the block stays as it was written. Pipes and files never see this.
"""

from __future__ import annotations

import os
import re

from longspec.cli.io.colour import can_colour
from longspec.cli.io.stdout import Output

__all__ = ["Page", "page"]

_PIECES = re.compile(r"\n|[^\S\n]+|[^\s]+")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_TAB = 8
_PADDING = re.compile(r" +((?:\x1b\[0m)?)$")


def page(*, raw: bool) -> Output | Page:
    """Standard output, as a page where it is a terminal."""
    if raw or not os.isatty(1) or os.environ.get("TERM", "") in ("", "dumb"):
        return Output()
    return Page(Output(), rendered=can_colour())


class Page:
    """A terminal below the cursor's line. rendered: blocks are drawn by rich at their ends, else words are wrapped
    alone.
    """

    is_file = False

    def __init__(self, output: Output, *, rendered: bool) -> None:
        self._output = output
        self._rendered = rendered
        self._begin()
        self._word = ""  # not written yet: its end may still come

    @property
    def is_ready(self) -> bool:
        return self._output.is_ready

    def check(self) -> None:
        self._output.check()

    def write(self, text: str) -> None:
        """Take more of the answer; its last word is written when the next one begins."""
        pieces = _PIECES.findall(self._word + text)
        self._word = pieces.pop() if pieces and not pieces[-1].isspace() else ""
        self._output.write("".join(map(self._place, pieces)))

    def end_line(self) -> None:
        """Write what is held back, draw the last block, and end its line."""
        word, self._word = self._word, ""
        self._output.write(self._place(word) if word else "")
        self._output.write(self._drawn() if self._block.strip() else "")
        self._output.end_line()
        self._begin()

    def _begin(self) -> None:
        """A block begins at the left edge."""
        self._size = _size()
        self._block, self._line = "", ""
        self._column, self._rows = 0, 0
        self._gap = ""  # spaces that are written with the word behind them
        self._fence = ""  # the mark that ends a fence of code

    def _place(self, piece: str) -> str:
        """What is written for a word, spaces or a line's end: it may end the line before it, or draw a block."""
        self._block += piece
        if piece == "\n":
            return self._newline()
        self._line += piece
        if piece.isspace():
            self._gap += piece.expandtabs(_TAB)
            return ""
        gap, self._gap = self._gap, ""
        width = _width(piece)
        if self._column and self._column + len(gap) + width > self._size[0]:
            self._rows += 1
            self._column, gap = 0, ""
            piece = "\n" + piece
        used = self._column + len(gap) + width
        self._rows += (used - 1) // self._size[0]  # a word that is wider than the screen is split by the terminal
        self._column = (used - 1) % self._size[0] + 1
        return gap + piece

    def _newline(self) -> str:
        line, self._line, self._gap = self._line, "", ""
        if not self._is_end(line):
            self._column = 0
            self._rows += 1
            return "\n"
        drawn, code = self._drawn(), self._fence
        self._begin()
        return drawn if drawn and code else f"{drawn}\n"

    def _is_end(self, line: str) -> bool:
        """Whether this line ends the block: an empty one, or the end of a fence of code."""
        mark = _FENCE.match(line)
        if self._fence:
            return mark is not None and mark[1].startswith(self._fence) and line.strip() == mark[1]
        if mark:
            self._fence = mark[1]
        return not line.strip()

    def _drawn(self) -> str:
        """The block by rich, in the place of what was written of it; nothing where it stays as it is."""
        if not self._block.strip() or not self._rendered or self._size != _size() or self._rows >= self._size[1]:
            return ""
        back = f"\x1b[{self._rows}A" if self._rows else ""
        return f"{back}\r\x1b[J{rendered(self._block, self._size[0])}"


def rendered(block: str, width: int) -> str:
    """A block of Markdown for a terminal of that width. Each row ends with a line's end, and with no spaces before it,
    which a narrower screen would fold; rows of code are as long as they are.
    """
    import io

    from rich.console import Console
    from rich.markdown import Markdown
    from rich.syntax import Syntax

    console = Console(file=(text := io.StringIO()), force_terminal=True, width=width, highlight=False)
    if mark := _FENCE.match(block):
        language, _, code = block[mark.end() :].partition("\n")
        lines = code.rstrip("\n").split("\n")
        code = "\n".join(lines[:-1] if lines[-1].strip().startswith(mark[1]) else lines)
        name = (language.split() or ["text"])[0]
        console.print(Syntax(code, name, theme="ansi_dark").highlight(code), soft_wrap=True, end="")
    else:
        console.print(Markdown(block, hyperlinks=False))
    rows = [_PADDING.sub(r"\1", row) for row in text.getvalue().strip("\n").split("\n")]
    return "\n".join(rows) + "\n"


def _size() -> tuple[int, int]:
    """Columns and rows of the terminal."""
    try:
        columns, rows = os.get_terminal_size(1)
    except OSError:
        columns, rows = 80, 24
    return columns or 80, rows or 24


def _width(word: str) -> int:
    if word.isascii():
        return len(word)
    from rich.cells import cell_len

    return cell_len(word)
