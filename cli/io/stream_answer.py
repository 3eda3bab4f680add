"""One answer from its source to an output: streamed, ended early by a signal, summarised.

A source is an engine loaded in this process (`Local`), or a running server (`longspec.cli.io.server_client`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from longspec.cli.io import signals
from longspec.cli.io.line_editor import quiet_keys
from longspec.cli.io.progress import thinking
from longspec.errors import LongspecError

if TYPE_CHECKING:
    from longspec.cli.io.output_file import OutputFile
    from longspec.cli.io.page import Page
    from longspec.cli.io.progress import Progress
    from longspec.cli.io.server_client import Remote, Reported
    from longspec.cli.io.stdout import Output
    from longspec.engine.answer import Answer
    from longspec.engine.engine import Engine
    from longspec.engine.session import Session

__all__ = ["CUT", "UNSAID", "Local", "Policy", "is_cut", "load", "say_choices", "statistics", "stream", "unsaid"]

CUT = "the answer was cut off by its limit, so it isn't whole; allow more with --max-new-tokens"
UNSAID = (
    "the tokens were used up by reasoning, which is hidden; allow more of them with --max-new-tokens, or bound the "
    "reasoning with --reasoning-budget"
)


@dataclass(frozen=True, slots=True)
class Policy:
    """The display of an answer. stream: each piece as it becomes final. text: its text, at least at the end. hide:
    without its reasoning. paint: a function that colours a piece at a terminal.
    """

    stream: bool
    text: bool
    hide: bool = False
    paint: Callable[[str], str] | None = None


@quiet_keys()
def stream(
    source: Local | Remote, output: Output | OutputFile | Page, progress: Progress, policy: Policy
) -> signals.Interrupted | None:
    """Write an answer to its end, or to a signal, which is returned. Its text so far is written then.

    A source has its text so far, also without its reasoning (`said`); `advance` takes the next piece, or waits up to
    a second, and `end` ends it with its text so far. It is broken after a signal within a step.
    """
    shown, interrupted = 0, None

    def show() -> None:
        nonlocal shown
        whole = source.said if policy.hide else source.text
        piece, shown = whole[shown:], len(whole)
        output.write(policy.paint(piece) if policy.paint is not None and piece else piece)

    try:
        while not source.is_over:
            try:
                source.advance(progress)
                if policy.stream and interrupted is None and len(source.said if policy.hide else source.text) > shown:
                    if not output.is_file:
                        progress.stop()
                    show()
                if policy.hide and source.thinking:
                    progress.report(thinking(source.thinking))
                elif source.tokens and (not policy.stream or output.is_file):
                    progress.report(f"writing, {source.tokens:,} tokens")
                output.check()
            except signals.Interrupted as end:
                if interrupted is not None or source.is_broken:
                    raise
                interrupted = end
                signals.answer()
                source.end()
    except BrokenPipeError:
        progress.stop()
        raise
    except Exception as error:
        progress.stop()
        with suppress(OSError, LongspecError):
            output.end_line()
        if interrupted is not None and isinstance(error, LongspecError) and not source.text:
            raise interrupted from error  # a server's word on a text that was ended before it began
        raise
    progress.stop()
    if policy.text and (interrupted is None or output.is_ready):
        show()
        output.end_line()
    return interrupted


class Local:
    """An answer of an engine in this process. resumable: the session will be continued, so a signal waits for the end
    of a step, and at least for the first one; else a long prefill ends at once.
    """

    def __init__(self, engine: Engine, session: Session, *, resumable: bool = False) -> None:
        self.session = session
        self.accepted: list[bool] = []  # per token of the answer: whether it was drafted
        self.is_broken = False
        self._engine = engine
        self._resumable = resumable
        self._cached = session.cached
        self._prefill = engine.prefill(session)
        self._prefilled = False

    @property
    def is_over(self) -> bool:
        return self.session.finish_reason is not None

    @property
    def text(self) -> str:
        return self.session.text

    @property
    def said(self) -> str:
        return self.session.said

    @property
    def tokens(self) -> int:
        return len(self.session.tokens) - self.session.prompt_length

    @property
    def thinking(self) -> int:
        section = self.session.section
        return section.tokens if section is not None and section.is_open else 0

    def advance(self, progress: Progress) -> None:
        """Run one chunk of the prompt, or one step."""
        if not self._prefilled:
            done = self._whole(lambda: next(self._prefill, None)) if self._resumable else next(self._prefill, None)
            self._prefilled = done is None
            if done is not None:
                total = self.session.prompt_length - 1 - self._cached
                progress.report("reading the prompt", done - self._cached, total)
            return
        commit = self._whole(lambda: self._engine.step([self.session]))[0]
        self.accepted += [i < commit.accepted for i in range(len(commit.tokens))]

    def end(self) -> None:
        if not self.is_over:
            self.session.interrupt()

    def _whole(self, work: Callable[[], Any]) -> Any:
        """The result of the call; the first signal waits for its end."""
        with signals.deferred():
            self.is_broken = self._resumable
            result = work()
            self.is_broken = False
        return result


def load(model: str, options: dict[str, Any], began: float, progress: Progress) -> Engine:
    """The engine, with its load time counted from `began`: imports are most of a small model's load."""
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
    say_choices(engine, progress)
    return engine


def say_choices(engine: Engine, progress: Progress) -> None:
    """What was planned, and with --verbose what was chosen."""
    if engine.plan is not None:
        progress.say(str(engine.plan))
    if not progress.verbose:
        return
    import torch

    from longspec.model.files.catalogue import catalogue

    model, speculator, drafter = engine.model, engine.speculator, None
    decoder, files = model.decoder, model.checkpoint
    place = "in memory" if files is None else files.gguf or files.folder
    progress.say(f"{model.name}: {place}")
    kernels = "the C kernels" if decoder.kernel is not None else f"torch's operators ({decoder.slow})"
    progress.say(f"{model.dtype} on {decoder.device} by {kernels}, {torch.get_num_threads()} threads")
    progress.say(f"cache {engine.cache_name}, drafter {engine.drafter_name}, {speculator.most} tokens at most")
    if model.name in catalogue():
        drafter = catalogue()[model.name].drafter
    if drafter is not None and not any("model" in name.split("+") for name in speculator.drafters):
        progress.say(f"{drafter} can draft for it: --draft-model {drafter}")


def unsaid(answer: Answer | Reported) -> bool:
    """Whether it ended within its reasoning, before the answer began."""
    return bool(answer.finish_reason == "length" and answer.usage["reasoning_tokens"] and not answer.text.strip())


def is_cut(answer: Answer | Reported, options: Mapping[str, Any]) -> bool:
    """Whether an answer that is held to a schema or an expression ended before its grammar did."""
    return answer.finish_reason == "length" and any(options.get(name) is not None for name in ("json_schema", "regex"))


def statistics(answer: Answer | Reported) -> str:
    """The closing line."""
    count, speculation, timing = answer.usage["completion_tokens"], answer.speculation, answer.timing
    reasoning = answer.usage["reasoning_tokens"]
    parts = [f"{count:,} tokens{f' ({reasoning:,} of reasoning)' if reasoning else ''} in {timing['decode_s']:.1f} s"]
    if timing["tokens_per_second"] is not None:
        parts[0] += f" ({timing['tokens_per_second']:.1f} tokens/s)"
    parts.append(f"{speculation['tokens_per_step']:.2f} tokens per step with {speculation['drafter']}")
    if len(bets := speculation.get("bets", {})) > 1:
        parts[-1] += (
            f" ({', '.join(f'{name} {steps}' for name, steps in bets.items())} of {speculation['steps']} steps)"
        )
    if speculation["drafted"]:
        parts.append(f"acceptance {speculation['accepted'] / speculation['drafted']:.2f}")
    if "meant" in speculation:
        parts.append(f"LOSSY: {speculation['meant']:,} tokens stayed for their meaning alone")
    if timing["time_to_first_token_s"] is not None:
        parts.append(f"first token after {timing['time_to_first_token_s']:.1f} s")
    parts.append(f"ended by {answer.finish_reason}")
    return ", ".join(parts)
