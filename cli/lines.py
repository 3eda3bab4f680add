"""`longspec run --each-line`: every line of standard input answered by itself, on one line, as the lines come.

Line n of what is written answers line n of what was read, so `paste` fits them together: a blank line gives a blank
line, a line that can't be used too (with --json an object that says why), and what is wrong with it goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from longspec.cli.prompt import text_of
from longspec.cli.writing import statistics, write
from longspec.errors import BudgetError, ContextError, LongspecError, UsageError

if TYPE_CHECKING:
    from longspec.cli.outfile import OutputFile
    from longspec.cli.output import Output
    from longspec.cli.progress import Progress
    from longspec.engine import Engine, Options
    from longspec.session import Session

__all__ = ["answer_lines", "one_line"]


def answer_lines(
    lines: Iterable[bytes],
    prompt: Callable[[str], str],
    load: Callable[[], Engine],
    output: Output | OutputFile,
    progress: Progress,
    writing: Options,
    *,
    as_json: bool,
    stats: bool,
) -> LongspecError | None:
    """Answer the lines in their order. The error that is to end the command is given if some couldn't be answered.

    The model is loaded when the first line that isn't blank has come. prompt: what is asked about a line's text.

    Raises:
        Interrupted: a signal came; what there was of its line's answer has been written.
    """
    engine, failed, number = None, 0, 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            output.write("\n")
            continue
        engine = engine or load()
        session = _session(engine, line, prompt, writing)
        if isinstance(session, LongspecError):
            failed += 1
            _tell(f"line {number}: {session}", progress)
            output.write((json.dumps({"error": str(session)}, ensure_ascii=False) if as_json else "") + "\n")
            continue
        interrupted = write(engine, session, output, progress, stream=False, text=False)
        answer = engine.answer(session)
        if interrupted is None or (session.answer and output.is_ready):
            said = json.dumps(answer.report(), ensure_ascii=False) if as_json else one_line(answer.text)
            output.write(said + "\n")
        for note in [*session.notes, *([statistics(answer)] if stats else [])]:
            progress.say(f"line {number}: {note}")
        if interrupted is not None:
            raise interrupted
    return LongspecError(f"{failed:,} of {number:,} lines couldn't be answered; why is said above.") if failed else None


def one_line(text: str) -> str:
    """The text without line ends: each, with the white space around it, is one space."""
    return " ".join(part for line in text.splitlines() if (part := line.strip()))


def _session(engine: Engine, line: bytes, prompt: Callable[[str], str], writing: Options) -> Session | LongspecError:
    """A session for this line, or what is wrong with it. What is wrong with all lines is raised."""
    try:
        asked = prompt(text_of(line, "it"))
    except UsageError as error:
        return error
    try:
        return engine.open(asked, **writing)
    except (ContextError, BudgetError) as error:
        return error


def _tell(sentence: str, progress: Progress) -> None:
    """An error, which --quiet doesn't silence; it may quote a foreign text, which a terminal must not obey."""
    progress.stop()
    with suppress(OSError, AttributeError):
        said = "".join(letter if letter.isprintable() else " " for letter in sentence)
        print(f"longspec: {said}", file=sys.stderr, flush=True)
