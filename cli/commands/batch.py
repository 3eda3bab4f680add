"""`longspec batch`: many prompts in, their answers in a file, resumed wherever it ended.

Everything is checked before the model is loaded: the input's format, the output's lines, the settings that it was begun
with. stdout stays empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from longspec import __version__
from longspec.cli import BEGAN
from longspec.cli.io import signals
from longspec.cli.io.progress import Progress
from longspec.cli.io.prompt_input import checked
from longspec.cli.io.stream_answer import load
from longspec.cli.options import batch as own
from longspec.cli.options import conflicts as precedence
from longspec.cli.options import reasoning as reasoning_options
from longspec.cli.options import shared as options
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.batch.inputs import Input
    from longspec.batch.requests import Fault, Item
    from longspec.engine.engine import Engine
    from longspec.engine.options import Options

__all__ = ["EPILOG", "batch"]

EPILOG = """\b
Examples:
  longspec batch prompts.jsonl -o answers.jsonl --max-new-tokens 200
  longspec batch reviews.csv -o labels.jsonl --template 'Is this review kind? {text}'
  longspec batch docs/*.md -o summaries.jsonl --template 'Summarise in one sentence: {text}'
  find . -name '*.py' -print0 | longspec batch --files-from - -0 -o out.jsonl --template 'What does this do? {text}'

\b
The same command again goes on where it ended. A line that can't be answered becomes a line with its error.
Exit code 1 says that there are such lines, 130 that it was interrupted.
"""

_UNKNOWN_NOTES = 8


def batch(
    ctx: typer.Context,
    inputs: own.Inputs = None,
    output: own.OutputFile = None,
    files_from: own.FilesFrom = None,
    null: own.Null = False,
    form: own.Format = None,
    template: own.Template = None,
    in_order: own.InOrder = False,
    limit: own.Limit = None,
    batch_size: own.BatchSize = None,
    max_errors: own.MaxErrors = None,
    retry_errors: own.RetryErrors = False,
    continue_anyway: own.ContinueAnyway = False,
    summary: own.Summary = None,
    system: options.System = None,
    raw: options.Raw = False,
    model: options.Model = "smollm2",
    drafter: options.Drafter = "auto",
    draft_model: options.DraftModel = None,
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    control: options.Control = "goodput",
    skip_set: options.SkipSet = None,
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
    reasoning_budget: reasoning_options.ReasoningBudget = None,
    effort: reasoning_options.Effort = None,
    stop_loops: reasoning_options.StopLoops = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer many prompts, and write each answer as a line of JSON.

    A line of the input is an object with `prompt` or `messages`, and with `id` and options of its own if it likes.
    """
    from longspec.batch.about import About, write_json  # late, as all below: every other command starts sooner
    from longspec.batch.inputs import open_input
    from longspec.batch.marks import fresh
    from longspec.batch.output import Output
    from longspec.cli.io.batch_loop import Loop

    if output is None:
        raise UsageError(
            f"The answers need a file: longspec batch {(inputs or ['prompts.jsonl'])[0]} -o answers.jsonl."
        )
    if output == "-":
        raise UsageError(
            "-o - is no file that can be gone on with; name a file for the answers, or ./- for one so named."
        )
    if retry_errors and in_order:
        raise UsageError("--retry-errors adds lines at the end, which --in-order forbids; leave one out.")
    writing: Options = {
        "system": checked(system, "--system") if system else None,
        "raw": raw,
        "max_new_tokens": max_new_tokens,
        "stop": [checked(text, "--stop") for text in stop or ()],
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        **reasoning_options.asked(reasoning_budget, effort, stop_loops),
    }
    loading: dict[str, Any] = {
        "drafter": drafter,
        "draft_model": draft_model,
        "num_speculative_tokens": num_speculative_tokens,
        "control": control,
        "skip_set": skip_set,
        "cache": cache,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "all_rows": all_rows,
        "strict": strict,
        "memory": memory,
    }
    precedence.writing(ctx, writing, {})
    precedence.betting(ctx, loading)
    width = batch_size
    if memory is not None:  # texts are planned at the model's whole context each: one, unless more are asked for
        width = loading["texts"] = batch_size or 1
    with (
        open_input(inputs or [], form=form, template=template, files_from=files_from, null=null) as source,
        Progress(model, quiet=quiet) as progress,
        Output(Path(output)) as out,
    ):
        for name in [*(inputs or []), *filter(None, [files_from, summary])]:
            if out.is_same(name):
                raise UsageError(f"{name} is the output too; name another one with -o.")
        about = About(out.path, empty=out.is_empty, anyway=continue_anyway)
        settings = {
            "input": source.digest,
            "format": source.format,
            "template": template,
            "order": "the input's" if in_order else "as they finish",
            **{name: value for name, value in writing.items() if name != "stop"},
            "stop": writing["stop"],
            "stop_loops": stop_loops or None,  # as in what was begun before there was such an option
        }
        about.check(settings)
        progress.report("reading what is there")
        finished, failed = out.finished(retry_errors=retry_errors)
        records = _noted(fresh(islice(source.records, limit), finished), progress)
        first = next(records, None)
        if first is None:
            progress.say(f"nothing is left to do: {len(finished):,} lines are in {out.path}")
            _summarise(summary, len(finished), failed)
            raise typer.Exit(1 if failed else 0)
        engine = load(model, loading, BEGAN, progress)
        made = _identity(engine)
        about.check(made)
        about.write({"longspec": __version__, "model": model, **settings, **made})
        from longspec.batch.job import Job
        from longspec.batch.tally import Tally

        job = Job(engine, chain((first,), records), writing, width, in_order=in_order)
        tally = Tally(len(finished), failed)
        left = _left(source, limit, len(finished))
        loop = Loop(job, out, tally, progress, max_errors, left, openai=source.format == "openai")
        complete = False
        try:
            loop.go()
            complete = True
        finally:
            progress.stop()
            with signals.deferred():
                said = tally.sentence(engine.drafter_name)
                progress.say(f"{said}; why they failed stands in {out.path}" if tally.failed else said)
                if summary is not None:
                    write_json(Path(summary), {"complete": complete, **tally.report(engine.drafter_name)})
    if tally.failed + tally.failed_before:
        raise typer.Exit(1)


def _summarise(summary: str | None, finished: int, failed: int) -> None:
    """The summary of a run that had nothing to do."""
    if summary is not None:
        from longspec.batch.about import write_json
        from longspec.batch.tally import Tally

        write_json(Path(summary), {"complete": True, **Tally(finished, failed).report("none")})


def _left(source: Input, limit: int | None, finished: int) -> int:
    """About how many records there are to be written; 0 where nobody knows."""
    if source.count is None and limit is None:
        return 0
    counts = [count for count in (source.count, limit) if count is not None]
    return max(0, min(counts) - finished)


def _identity(engine: Engine) -> dict[str, str]:
    """What else makes an answer what it is, in the words of an error."""
    made = engine.model.fingerprint
    return {
        "weights": made["model"],
        "tokenizer": made["tokenizer"],
        "dtype": made["dtype"],
        "strictness": made["strictness"],
        "cache": engine.cache_name,
    }


def _noted(records: Iterator[Item | Fault], progress: Progress) -> Iterator[Item | Fault]:
    """The records, while each new field that says nothing to us is named once."""
    from longspec.batch.requests import Item

    named: set[str] = set()
    for record in records:
        for field in record.unknown if isinstance(record, Item) else ():
            if field not in named and len(named) < _UNKNOWN_NOTES:
                named.add(field)
                progress.say(f"the field {field[:100]!r} is left aside, first in record {record.index + 1}")
        yield record
