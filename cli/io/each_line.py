"""`longspec run --each-line`: every line of standard input is a prompt, answered on one line, as the lines arrive.

Output line n answers input line n, so that `paste` joins them: a blank line gives a blank line, and so does one that
can't be answered (with --json an object with the error), whose error goes to stderr.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

from longspec.cli import BEGAN
from longspec.cli.io.progress import printable
from longspec.cli.io.prompt_input import joined, read_head, read_lines, text_of
from longspec.cli.io.stream_answer import CUT, UNSAID, Local, is_cut, load, statistics, stream, unsaid
from longspec.errors import ContextError, LongspecError, UsageError, reported

if TYPE_CHECKING:
    from longspec.cli.io.progress import Progress
    from longspec.cli.io.run_request import Call
    from longspec.cli.io.signals import Interrupted
    from longspec.engine.engine import Engine
    from longspec.engine.session import Session

__all__ = ["answer_lines", "one_line"]


def answer_lines(call: Call) -> LongspecError | None:
    """Answer the lines in order. Returns the error to exit with if some couldn't be answered.

    The model is loaded at the first non-blank line.

    Raises:
        UsageError: the options don't allow it.
        Interrupted: a signal came; the current answer so far has been written.
    """
    if call.no_stdin:
        raise UsageError("--each-line answers the lines of standard input and --no-stdin forbids it; leave one out.")
    if not call.form.takes_input:
        raise UsageError(f"The template {call.form.name} takes no input, so its answers are all one; drop --each-line.")
    head, output, progress = read_head(call.argument, call.files), call.output, call.progress
    engine, failed, number, started = None, 0, 0, perf_counter()
    for number, line in enumerate(read_lines(progress.say), 1):
        if not line.strip():
            output.write("\n")
            continue
        if engine is None:  # waiting for the line isn't its time
            engine = load(call.model, call.loading, BEGAN + perf_counter() - started, progress)
        try:
            session = _session(engine, head, line, call)
            interrupted = _written(engine, session, call)
        except _LineError as error:
            failed += 1
            _tell(f"line {number}: {error}", progress)
            output.write((_object({"error": str(error)}) if call.as_json else "") + "\n")
            continue
        answer = engine.answer(session)
        if interrupted is None or (session.answer and output.is_ready):
            text = session.said if call.policy.hide else session.text
            written = _object(answer.report()) if call.as_json else one_line(text)
            output.write(written + "\n")
        hidden = [UNSAID] if call.policy.hide and unsaid(answer) else []
        hidden += [CUT] if is_cut(answer, call.writing) else []
        for note in [*session.notes, *hidden, *([statistics(answer)] if call.stats else [])]:
            progress.say(f"line {number}: {note}")
        if interrupted is not None:
            raise interrupted
    return LongspecError(f"{failed:,} of {number:,} lines couldn't be answered; why is said above.") if failed else None


def one_line(text: str) -> str:
    """The text on one line: each line end, with the white space around it, becomes one space."""
    return " ".join(part for line in text.splitlines() if (part := line.strip()))


class _LineError(Exception):
    """What is wrong with one line, and with no other."""


def _session(engine: Engine, head: str, line: bytes, call: Call) -> Session:
    """A session for this line. Raises _LineError, or the UsageError that every line would have."""
    try:
        prompt = call.form.fill(joined([head, text_of(line, "it")]))
    except UsageError as error:
        raise _LineError(str(error)) from error
    try:
        return engine.open(prompt, **call.writing)
    except Exception as error:  # as in a batch: no line may end the others
        if isinstance(error, UsageError) and not isinstance(error, ContextError):
            engine.prepare("A", **call.writing)  # raises where the options are wrong
        raise _LineError(str(reported(error))) from error


def _written(engine: Engine, session: Session, call: Call) -> Interrupted | None:
    """Write the line's answer to its end, or to a signal. Raises _LineError; BrokenPipeError if nobody reads on."""
    try:
        return stream(Local(engine, session), call.output, call.progress, call.policy)
    except BrokenPipeError:
        raise
    except Exception as error:  # of the engine: nothing is put out until the answer is whole
        raise _LineError(str(reported(error))) from error


def _object(report: dict[str, Any]) -> str:
    return json.dumps(report, ensure_ascii=False)


def _tell(sentence: str, progress: Progress) -> None:
    """Print an error, with --quiet too, without control characters: it may quote an untrusted text."""
    progress.stop()
    with suppress(OSError, AttributeError):
        print(f"longspec: {printable(sentence)}", file=sys.stderr, flush=True)
