"""`longspec run`: one prompt in, one answer out, streamed; or every line of standard input, one by one.

Reads the prompt before loading anything, so that an invalid one is reported at once. Everything but the answer goes
to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

from longspec.cli import BEGAN
from longspec.cli.commands.prompts import NAME, PARAM
from longspec.cli.io import server_client as remote
from longspec.cli.io import signals
from longspec.cli.io.distinct import refuse_same_files
from longspec.cli.io.each_line import answer_lines
from longspec.cli.io.output_file import OutputFile
from longspec.cli.io.page import Page, page
from longspec.cli.io.progress import Progress
from longspec.cli.io.prompt_input import checked, read_prompt
from longspec.cli.io.run_request import Call, make_form
from longspec.cli.io.stdout import Output
from longspec.cli.io.stream_answer import CUT, UNSAID, Local, Policy, is_cut, load, statistics, stream, unsaid
from longspec.cli.options.groups import argument, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.reporting import NO_SERVER, RAW_OUTPUT, Reporting
from longspec.cli.options.writing import Constraints, Framing, Reasoning, SamplingOptions, text_options
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.cli.io.log import Entry
    from longspec.engine.answer import Answer
    from longspec.engine.engine import Engine
    from longspec.engine.options import Options
    from longspec.engine.session import Session
    from longspec.text.prompt import Prompt
    from longspec.text.tokenizer import Vocabulary

__all__ = ["EPILOG", "run"]

EPILOG = """\b
Examples:
  longspec run "Why is the sky blue?"
  cat report.txt | longspec run "Summarise this in three sentences:" > summary.txt
  longspec run -f question.md --temperature 0.8 --seed 1 --stats
  longspec run --json --max-new-tokens 64 "List the planets." | jq -r .text
  git diff --staged | longspec run -t commit-message
  longspec run -m Qwen/Qwen3-0.6B --hide-reasoning --reasoning-budget 500 "Is 1001 prime?"
  longspec run --each-line -t translate -p to=German -o de.txt < en.txt

\b
The answer goes to stdout, and ends with a newline; everything else goes to stderr.
Every flag has its opposite (--no-stats, --stream) for what the environment or config.toml sets.
"""


@group("Prompt")
class Asking:
    """The sources of the prompt."""

    prompt: str | None = argument(None, "The prompt. - reads standard input.", metavar="PROMPT")
    file: list[str] | None = option(
        None, "Add a file to the prompt; may be repeated.", short="-f", metavar="FILE", once=True
    )
    no_stdin: bool = option(False, "Leave standard input alone. Without it, what is piped in is read to its end.")
    template: str | None = NAME
    param: list[Any] | None = PARAM
    each_line: bool = option(
        False, "Answer every line of standard input by itself, each answer on one line.", once=True
    )
    go_on: bool = option(
        False,
        "Go on from the last answer in the log, and keep this one there.",
        flag="--continue",
        short="-c",
        once=True,
    )


@group("Output")
class Delivery:
    """The answer's format and destination."""

    prompt_cache: str | None = option(
        None, "Keep what was read of the prompt in FILE, and begin with it the next time.", metavar="FILE", once=True
    )
    output: str | None = option(
        None,
        "Write the answer to FILE, which is there when it is whole; until then it is FILE.part.",
        short="-o",
        metavar="FILE",
        once=True,
    )
    no_server: bool = NO_SERVER
    no_stream: bool = option(False, "Print the answer when it is whole.")
    raw_output: bool = RAW_OUTPUT
    log: bool = option(False, "Keep prompt and answer in a log, which longspec logs shows.")


@group("Output")
class Tracing:
    """The options of profiling."""

    profile: str | None = option(
        None,
        "Write torch's trace of the run to FILE (Chrome's JSON), and on stderr where a step's time goes.",
        metavar="FILE",
        once=True,
    )


def run(
    ctx: typer.Context,
    asking: Asking,
    framing: Framing,
    loading: Loading,
    sampling: SamplingOptions,
    reasoning: Reasoning,
    constraints: Constraints,
    delivery: Delivery,
    reporting: Reporting,
    tracing: Tracing,
) -> None:
    """Answer one prompt.

    The prompt is the argument, then the files, then what is piped in, with a blank line between them.
    """
    more = {"prompt_cache": delivery.prompt_cache, **constraints.checked()}
    form = make_form(asking.template, asking.param or [])
    writing = text_options(ctx, framing, sampling, reasoning, more, form.defaults)
    options = loading.engine_options(ctx)
    reporting = reporting.settled(ctx)
    unanswered = None
    read = [*(asking.file or []), *(loading.draft_from or []), loading.model, loading.skip_set, constraints.json_schema]
    _check_places(asking, delivery, tracing, read)
    with (
        Progress(loading.model, quiet=reporting.quiet, verbose=reporting.verbose) as progress,
        _opened(delivery.output, progress, raw=delivery.raw_output or reporting.as_json or asking.each_line) as out,
        _traced(tracing.profile, progress) as trace,
    ):
        call = Call(
            argument=asking.prompt,
            files=asking.file or [],
            no_stdin=asking.no_stdin,
            form=form,
            model=loading.model,
            loading=options,
            writing=writing,
            output=out,
            progress=progress,
            policy=Policy(
                stream=not (delivery.no_stream or reporting.as_json or asking.each_line),
                text=not (reporting.as_json or asking.each_line),
                hide=reasoning.hide_reasoning,
            ),
            as_json=reporting.as_json,
            stats=reporting.stats,
            no_server=delivery.no_server,
            trace=trace,
            log=delivery.log or asking.go_on,
            earlier=_earlier() if asking.go_on else (),
        )
        if asking.each_line:
            unanswered = answer_lines(call)
        else:
            _answer(call)
    if unanswered is not None:  # only now that all valid lines are in the file
        raise unanswered


def _check_places(asking: Asking, delivery: Delivery, tracing: Tracing, read: Sequence[str | Path | None]) -> None:
    """Refuse to write over what is read, or what can't be written for many answers, before anything is."""
    written = {
        "the output": delivery.output,
        "a part of the output": delivery.output and f"{delivery.output}.part",
        "the prompt cache": delivery.prompt_cache,
        "the profile": tracing.profile,
    }
    refuse_same_files(written, read)
    if asking.each_line and (asking.go_on or delivery.log):
        raise UsageError("--each-line writes many answers, and the log is of conversations; leave one out.")
    if tracing.profile is not None and asking.each_line:
        raise UsageError("--profile follows one answer, and --each-line writes many; leave one out.")


def _answer(call: Call) -> None:
    started = perf_counter()
    prompt, system = _prompt(call), call.writing["system"]
    text: str | list[dict[str, Any]] = prompt
    if call.earlier:
        text, system = _going_on(call, prompt)
    began = BEGAN + perf_counter() - started  # waiting for a pipe isn't the answer's time
    answer: Answer | remote.Reported
    served = None
    if not (call.no_server or call.trace):
        served = remote.write(
            call.model, call.loading, text, call.writing, call.output, call.progress, call.policy, began=began
        )
    if served is not None and call.progress.verbose:
        call.progress.say(remote.SERVED)
    answer, interrupted = served or _written(call, text, began)
    if call.log:
        from longspec.cli.io import log

        log.keep(system, prompt, answer, conversation=call.earlier[0].conversation if call.earlier else None)
    if call.as_json:
        call.output.write(json.dumps(answer.report(), ensure_ascii=False) + "\n")
    if call.policy.hide and unsaid(answer):
        call.progress.say(UNSAID)
    if is_cut(answer, call.writing):
        call.progress.say(CUT)
    if call.stats:
        call.progress.say(statistics(answer))
    if interrupted is not None and answer.finish_reason == "interrupted":
        raise interrupted


def _earlier() -> Sequence[Entry]:
    """The last conversation in the log. Raises UsageError where there is none."""
    from longspec.cli.io import log

    if not (found := log.conversation()):
        raise UsageError("There is no answer in the log to go on from; longspec run --log keeps one.")
    return found


def _going_on(call: Call, prompt: str) -> tuple[list[dict[str, Any]], str | None]:
    """The conversation's messages with a new prompt, and its system message: the last one that was given."""
    if call.writing["raw"]:
        raise UsageError("--raw goes on from a text, and --continue from a conversation; leave one out.")
    system = call.writing["system"] or call.earlier[-1].system
    call.writing["system"] = system
    messages = []
    for one in call.earlier:
        messages += [{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.answer}]
    return [*messages, {"role": "user", "content": prompt}], system


def _written(call: Call, text: Prompt, began: float) -> tuple[Answer, signals.Interrupted | None]:
    """The answer, by a model loaded in this process."""
    loading, progress = call.loading, call.progress
    if loading["memory"] is not None:
        loading = {**loading, "tokens": lambda vocabulary: _length(vocabulary, text, call.writing)}
    engine = load(call.model, loading, began, progress)
    session = engine.open(text, **call.writing)
    following = nullcontext() if call.trace is None else _profiled(call.trace, engine, session, progress)
    with following:
        interrupted = stream(Local(engine, session), call.output, progress, call.policy)
    for note in session.notes:
        progress.say(note)
    engine.keep_costs()
    return engine.answer(session, began), interrupted


@contextmanager
def _profiled(trace: OutputFile, engine: Engine, session: Session, progress: Progress) -> Iterator[None]:
    """Profile the block, then print the table and write the trace."""
    from longspec.bench.profile import profiled, table
    from longspec.machine.bandwidth import memory_rate

    with profiled(engine) as times:
        yield
    progress.report("measuring how fast memory is read")
    if said := table(times, engine, session, memory_rate(engine.model.decoder.device)):
        progress.say(said)
    trace.write(times.trace)


def _prompt(call: Call) -> str:
    """The prompt's text."""
    if call.form.takes_input:
        text = read_prompt(call.argument, call.files, no_stdin=call.no_stdin, say=call.progress.say)
        return call.form.fill(text)
    if call.argument is not None or call.files:
        raise UsageError(f"The template {call.form.name} takes no input, and one was given; leave it out.")
    return call.form.fill("")


def _opened(name: str | None, progress: Progress, *, raw: bool) -> AbstractContextManager[Output | OutputFile | Page]:
    """Standard output, as a page where that is a terminal, or an output file instead."""
    if name is None or name == "-":
        return nullcontext(page(raw=raw))
    return OutputFile(checked(name, "--output"), progress.say)


def _traced(name: str | None, progress: Progress) -> AbstractContextManager[OutputFile | None]:
    """The profile's output file, if there is one."""
    return nullcontext() if name is None else OutputFile(checked(name, "--profile"), progress.say)


def _length(vocabulary: Vocabulary, prompt: Prompt, writing: Options) -> int | None:
    """The planned maximum of prompt and answer, in tokens; None where only the model's context limits them."""
    from longspec.engine.options import tokens_of

    new_tokens = writing["max_new_tokens"]
    if new_tokens is None:
        return None
    return len(tokens_of(vocabulary, prompt, writing)) + new_tokens
