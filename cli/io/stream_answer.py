"""One text from an engine to an output: loaded, streamed, ended by a signal with what there is of it, summed up."""

from __future__ import annotations

import os
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

from longspec.cli.io import signals
from longspec.cli.io.progress import thinking
from longspec.errors import LongspecError

if TYPE_CHECKING:
    from longspec.cli.io.output_file import OutputFile
    from longspec.cli.io.progress import Progress
    from longspec.cli.io.server_client import Reported
    from longspec.cli.io.stdout import Output
    from longspec.engine.answer import Answer
    from longspec.engine.engine import Engine
    from longspec.engine.session import Session

__all__ = ["UNSAID", "load", "statistics", "unsaid", "write"]


def load(model: str, options: dict[str, Any], began: float, progress: Progress) -> Engine:
    """The engine, with its seconds counted from `began`: imports are most of a small model's load."""
    progress.report(f"loading {model}")
    from longspec.engine.engine import Engine

    signals.check()
    imported = perf_counter()
    if not progress.drawn:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    engine = Engine.load(model, report=progress.report, **options)
    signals.check()
    seconds = {"load_s": perf_counter() - began, "import_s": imported - began}
    engine.load_seconds = {**engine.load_seconds, **seconds}
    if engine.plan is not None:
        progress.say(str(engine.plan))
    return engine


def write(
    engine: Engine,
    session: Session,
    output: Output | OutputFile,
    progress: Progress,
    *,
    stream: bool,
    text: bool,
    hide: bool = False,
) -> signals.Interrupted | None:
    """Write the session to its end, or to a signal, which is given back. What there is of its text is written then.

    stream: each piece as it becomes certain. text: at least at the end. hide: without what was thought.
    """
    shown, interrupted = 0, None
    try:
        for done in engine.prefill(session):
            progress.report("reading the prompt", done, session.prompt_length - 1)
        while session.finish_reason is None:
            with signals.deferred():
                [commit] = engine.step([session])
            piece = commit.said if hide else commit.text
            if stream and piece:
                if not output.is_file:
                    progress.stop()
                shown += len(piece)
                output.write(piece)
            if hide and session.section is not None and session.section.is_open:
                progress.report(thinking(session.section.tokens))
            elif not stream or output.is_file:
                progress.report(f"writing, {len(session.answer):,} tokens")
            output.check()
    except signals.Interrupted as end:
        interrupted = end
        signals.answer()
        if session.finish_reason is None:
            session.interrupt()
    except BrokenPipeError:
        raise
    except Exception:
        with suppress(OSError, LongspecError):
            output.end_line()
        raise
    if text and (interrupted is None or output.is_ready):
        output.write((session.said if hide else session.text)[shown:])
        output.end_line()
    return interrupted


UNSAID = (
    "the tokens were used up by reasoning, which is hidden; allow more of them with --max-new-tokens, or bound the "
    "reasoning with --reasoning-budget"
)


def unsaid(answer: Answer | Reported) -> bool:
    """It ended before anything was said."""
    return bool(answer.finish_reason == "length" and answer.usage["reasoning_tokens"] and not answer.text.strip())


def statistics(answer: Answer | Reported) -> str:
    """The closing line."""
    count, bets, timing = answer.usage["completion_tokens"], answer.speculation, answer.timing
    thought = answer.usage["reasoning_tokens"]
    parts = [f"{count:,} tokens{f' ({thought:,} of reasoning)' if thought else ''} in {timing['decode_s']:.1f} s"]
    if timing["tokens_per_second"] is not None:
        parts[0] += f" ({timing['tokens_per_second']:.1f} tokens/s)"
    parts.append(f"{bets['tokens_per_step']:.2f} tokens per step with {bets['drafter']}")
    if bets["drafted"]:
        parts.append(f"acceptance {bets['accepted'] / bets['drafted']:.2f}")
    if timing["time_to_first_token_s"] is not None:
        parts.append(f"first token after {timing['time_to_first_token_s']:.1f} s")
    parts.append(f"ended by {answer.finish_reason}")
    return ", ".join(parts)
