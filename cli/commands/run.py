"""`longspec run`: one prompt in, one answer out, streamed; or every line of standard input, one by one.

Reads the prompt before it loads anything, so that a wrong one costs no time. Everything but the answer goes to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from longspec.cli import BEGAN
from longspec.cli.commands import prompts
from longspec.cli.io import server_client as remote
from longspec.cli.io import signals
from longspec.cli.io.each_line import answer_lines
from longspec.cli.io.output_file import OutputFile
from longspec.cli.io.progress import Progress
from longspec.cli.io.prompt_input import checked, read_prompt
from longspec.cli.io.run_request import Call, make_form
from longspec.cli.io.stdout import Output
from longspec.cli.io.stream_answer import UNSAID, load, statistics, unsaid, write
from longspec.cli.options import conflicts as precedence
from longspec.cli.options import constraints as held
from longspec.cli.options import reasoning as reasoning_options
from longspec.cli.options import shared as options
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.engine.answer import Answer
    from longspec.engine.engine import Engine
    from longspec.engine.options import Options
    from longspec.engine.session import Session
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


def run(
    ctx: typer.Context,
    prompt: options.Prompt = None,
    file: options.File = None,
    no_stdin: options.NoStdin = False,
    template: prompts.Option = None,
    param: prompts.Param = None,
    each_line: options.EachLine = False,
    system: options.System = None,
    raw: options.Raw = False,
    model: options.Model = "smollm2",
    drafter: options.Drafter = "auto",
    draft_model: options.DraftModel = None,
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    control: options.Control = "goodput",
    skip_set: options.SkipSet = None,
    draft_from: options.DraftFrom = None,
    remember: options.Remember = False,
    cache: options.Cache = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    all_rows: options.AllRows = False,
    memory: options.Memory = None,
    strict: options.Strict = False,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    hide_reasoning: reasoning_options.HideReasoning = False,
    reasoning_budget: reasoning_options.ReasoningBudget = None,
    effort: reasoning_options.Effort = None,
    stop_loops: reasoning_options.StopLoops = False,
    json_schema: held.JsonSchema = None,
    regex: held.Regex = None,
    prompt_cache: options.PromptCache = None,
    output: options.OutputFile = None,
    no_server: options.NoServer = False,
    no_stream: options.NoStream = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    stats: options.Stats = False,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            rich_help_panel="Output",
            help="Write torch's trace of the run to FILE (Chrome's JSON), and on stderr where a step's time goes.",
        ),
    ] = None,
) -> None:
    """Answer one prompt.

    The prompt is the argument, then the files, then what is piped in, with a blank line between them.
    """
    writing: Options = {
        "system": checked(system, "--system") if system else None,
        "raw": raw,
        "prompt_cache": prompt_cache,
        "max_new_tokens": max_new_tokens,
        "stop": [checked(text, "--stop") for text in stop or ()],
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        **reasoning_options.asked(reasoning_budget, effort, stop_loops),
        **held.checked(json_schema, regex),
    }
    loading = {
        "drafter": drafter,
        "draft_model": draft_model,
        "num_speculative_tokens": num_speculative_tokens,
        "control": control,
        "skip_set": skip_set,
        "draft_from": draft_from or (),
        "remember": remember,
        "cache": cache,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "all_rows": all_rows,
        "strict": strict,
        "memory": memory,
    }
    form = make_form(template, param or [])
    precedence.writing(ctx, writing, form.defaults)
    precedence.betting(ctx, loading)
    quiet, stats = precedence.reporting(ctx, quiet, stats)
    unanswered = None
    if profile is not None and each_line:
        raise UsageError("--profile follows one answer, and --each-line writes many; leave one out.")
    with (
        Progress(model, quiet=quiet) as progress,
        _opened(output, progress) as out,
        _traced(profile, progress) as trace,
    ):
        call = Call(
            argument=prompt,
            files=file or [],
            no_stdin=no_stdin,
            form=form,
            model=model,
            loading=loading,
            writing=writing,
            output=out,
            progress=progress,
            stream=not (no_stream or as_json),
            as_json=as_json,
            stats=stats,
            no_server=no_server,
            hide_reasoning=hide_reasoning,
            trace=trace,
        )
        if each_line:
            unanswered = answer_lines(call)
        else:
            _answer(call)
    if unanswered is not None:  # only now: the file has every line that could be answered
        raise unanswered


def _answer(call: Call) -> None:
    asked = perf_counter()
    text = _prompt(call)
    began = BEGAN + perf_counter() - asked  # waiting for a pipe isn't the answer's time
    answer: Answer | remote.Reported
    served = None if call.no_server or call.trace else _served(call, text, began)
    answer, interrupted = served or _written(call, text, began)
    if call.as_json:
        call.output.write(json.dumps(answer.report(), ensure_ascii=False) + "\n")
    if call.hide_reasoning and unsaid(answer):
        call.progress.say(UNSAID)
    if call.stats:
        call.progress.say(statistics(answer))
    if interrupted is not None and answer.finish_reason == "interrupted":
        raise interrupted


def _served(call: Call, text: str, began: float) -> tuple[remote.Reported, signals.Interrupted | None] | None:
    """By a server that is up with the same model and settings; None where there is none."""
    return remote.write(
        call.model,
        call.loading,
        text,
        call.writing,
        call.output,
        call.progress,
        began=began,
        stream=call.stream,
        text=not call.as_json,
        hide=call.hide_reasoning,
    )


def _written(call: Call, text: str, began: float) -> tuple[Answer, signals.Interrupted | None]:
    """By a model that is loaded here."""
    loading, progress = call.loading, call.progress
    if loading["memory"] is not None:
        loading = {**loading, "tokens": lambda vocabulary: _length(vocabulary, text, call.writing)}
    engine = load(call.model, loading, began, progress)
    session = engine.open(text, **call.writing)
    hide, text_too = call.hide_reasoning, not call.as_json
    following = nullcontext() if call.trace is None else _profiled(call.trace, engine, session, progress)
    with following:
        interrupted = write(engine, session, call.output, progress, stream=call.stream, text=text_too, hide=hide)
    progress.stop()
    for note in session.notes:
        progress.say(note)
    engine.keep_costs()
    return engine.answer(session, began), interrupted


@contextmanager
def _profiled(trace: OutputFile, engine: Engine, session: Session, progress: Progress) -> Iterator[None]:
    """What is written inside is followed, and at the end said."""
    from longspec.bench.profile import profiled, read_rate, table

    with profiled(engine) as times:
        yield
    progress.report("measuring how fast memory is read")
    if said := table(times, engine, session, read_rate(engine.model.decoder.device)):
        progress.say(said)
    trace.write(times.trace)


def _prompt(call: Call) -> str:
    """What the model is asked."""
    if call.form.takes_input:
        text = read_prompt(call.argument, call.files, no_stdin=call.no_stdin, say=call.progress.say)
        return call.form.fill(text)
    if call.argument is not None or call.files:
        raise UsageError(f"The template {call.form.name} takes no input, and one was given; leave it out.")
    return call.form.fill("")


def _opened(name: str | None, progress: Progress) -> AbstractContextManager[Output | OutputFile]:
    """Standard output, or the file in its place."""
    if name is None or name == "-":
        return nullcontext(Output())
    return OutputFile(checked(name, "--output"), progress.say)


def _traced(name: str | None, progress: Progress) -> AbstractContextManager[OutputFile | None]:
    """Where a profile goes, if one is asked for."""
    return nullcontext() if name is None else OutputFile(checked(name, "--profile"), progress.say)


def _length(vocabulary: Vocabulary, prompt: str, writing: Options) -> int | None:
    """How long prompt and answer may become; None where only the model's context ends them."""
    from longspec.engine.options import tokens_of

    asked = writing["max_new_tokens"]
    if asked is None:
        return None
    return len(tokens_of(vocabulary, prompt, writing)) + asked
