"""`longspec batch`: many prompts in, their answers in a file, resumed wherever it ended.

Everything is checked before the model is loaded: the input's format, the output's lines, the settings that it was begun
with. stdout stays empty.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec import __version__
from longspec.batch.about import About, write_json
from longspec.batch.inputs import FORMATS, Input, open_input
from longspec.batch.marks import fresh
from longspec.batch.output import Output
from longspec.batch.records import line
from longspec.batch.requests import Fault, Item
from longspec.cli import BEGAN, options, signals
from longspec.cli.command import given
from longspec.cli.progress import Progress
from longspec.cli.prompt import checked
from longspec.errors import LongspecError, UsageError

if TYPE_CHECKING:
    from longspec.batch.job import Job, Result
    from longspec.batch.tally import Tally
    from longspec.engine import Engine
    from longspec.options import Options

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

_FILES = "Input and output"
_DRAIN_SECONDS = 5.0
_DRAW_SECONDS = 0.2
_NOTE_SECONDS = 60.0
_UNKNOWN_NOTES = 8

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IN...",
        rich_help_panel=_FILES,
        help="A file of prompts (.jsonl, .csv, .tsv, .txt), - for standard input, or many files of one prompt each.",
    ),
]
OutputFile = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        rich_help_panel=_FILES,
        help="Where the answers go, one line of JSON each. What is there is gone on with.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        rich_help_panel=_FILES,
        help=f"What IN is, if its name and first line don't tell: {', '.join(FORMATS)}.",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        rich_help_panel=_FILES,
        help="The prompt of each record, with its fields in braces: a column, a key, {text} of a line or a file, {path}.",
    ),
]
FilesFrom = Annotated[
    str | None,
    typer.Option(
        "--files-from",
        metavar="LIST",
        rich_help_panel=_FILES,
        help="Read the names of files of one prompt each from LIST, or from standard input (-).",
    ),
]
Null = Annotated[
    bool,
    typer.Option("--null/--no-null", "-0", rich_help_panel=_FILES, help="The names in LIST end with NUL."),
]
InOrder = Annotated[
    bool,
    typer.Option(
        "--in-order/--no-in-order",
        rich_help_panel=_FILES,
        help="Write answers in the order of the input, not as they finish.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        parser=options.whole(1),
        rich_help_panel=_FILES,
        help="Take the first N records of the input only.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        parser=options.whole(1),
        rich_help_panel=_FILES,
        help="Write N texts side by side; 16 if left out. The answers don't depend on it.",
    ),
]
MaxErrors = Annotated[
    int | None,
    typer.Option(
        "--max-errors",
        metavar="N",
        parser=options.whole(0),
        rich_help_panel=_FILES,
        help="Give up when more than N lines have failed.",
    ),
]
RetryErrors = Annotated[
    bool,
    typer.Option(
        "--retry-errors/--no-retry-errors",
        rich_help_panel=_FILES,
        help="Take the errors out of OUT and try those lines again.",
    ),
]
ContinueAnyway = Annotated[
    bool,
    typer.Option(
        "--continue-anyway/--no-continue-anyway",
        rich_help_panel=_FILES,
        help="Go on in OUT although it was begun with another input, model or setting.",
    ),
]
Summary = Annotated[
    str | None,
    typer.Option(
        "--summary",
        metavar="FILE",
        rich_help_panel=_FILES,
        help="Write what the run did, in numbers, to FILE as JSON.",
    ),
]


def batch(
    ctx: typer.Context,
    output: OutputFile,
    inputs: Inputs = None,
    files_from: FilesFrom = None,
    null: Null = False,
    form: Format = None,
    template: Template = None,
    in_order: InOrder = False,
    limit: Limit = None,
    batch_size: BatchSize = None,
    max_errors: MaxErrors = None,
    retry_errors: RetryErrors = False,
    continue_anyway: ContinueAnyway = False,
    summary: Summary = None,
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
    quiet: options.Quiet = False,
) -> None:
    """Answer many prompts, and write each answer as a line of JSON.

    A line of the input is an object with `prompt` or `messages`, and with `id` and options of its own if it likes.
    """
    if raw and system:
        raise UsageError("--raw sends the prompt without roles, so there is no place for --system; leave one out.")
    if retry_errors and in_order:
        raise UsageError("--retry-errors adds lines at the end, which --in-order forbids; leave one out.")
    if temperature == 0 and given(ctx, "temperature"):  # greedy: what settings say of sampling gives way
        top_p = top_p if given(ctx, "top_p") else None
        top_k = top_k if given(ctx, "top_k") else None
        min_p = min_p if given(ctx, "min_p") else None
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
    }
    loading: dict[str, Any] = {
        "drafter": drafter,
        "draft_model": draft_model,
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
    if num_speculative_tokens is not None:
        loading["num_speculative_tokens"] = num_speculative_tokens
    width = _width(batch_size, memory)
    source = open_input(inputs or [], form=form, template=template, files_from=files_from, null=null)
    with Progress(model, quiet=quiet) as progress, Output(Path(output)) as out:
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
        }
        about.check(settings)
        progress.report("reading what is there")
        finished, failed = out.finished(retry_errors=retry_errors)
        engine = _load(model, loading, progress)
        if engine.plan is not None:
            progress.say(str(engine.plan))
        made = _identity(engine)
        about.check(made)
        about.write({"longspec": __version__, "model": model, **settings, **made})
        from longspec.batch.job import Job
        from longspec.batch.tally import Tally

        records = _noted(fresh(islice(source.records, limit), finished), progress)
        job = Job(engine, records, writing, width, in_order=in_order)
        tally = Tally(len(finished), failed)
        run = _Run(job, out, tally, progress, max_errors, _left(source, limit, len(finished)), source.format == "openai")
        complete = False
        try:
            run.go()
            complete = True
        finally:
            progress.stop()
            with signals.deferred():
                progress.say(tally.sentence(engine.drafter_name))
                if summary is not None:
                    write_json(Path(summary), {"complete": complete, **tally.report(engine.drafter_name)})
    if tally.failed + tally.failed_before:
        raise typer.Exit(1)


def _width(batch_size: int | None, memory: object) -> int:
    """Texts at a time. A memory plan is made for one text: the one place to change when it can be made for several."""
    from longspec.schedule import WIDTH

    if memory is None:
        return batch_size or WIDTH
    if batch_size not in (None, 1):
        raise UsageError(
            f"--memory is planned for one text at a time, and --batch-size is {batch_size}; leave one of them out."
        )
    return 1


def _left(source: Input, limit: int | None, finished: int) -> int:
    """About how many records there are to be written; 0 where nobody knows."""
    if source.count is None and limit is None:
        return 0
    counts = [count for count in (source.count, limit) if count is not None]
    return max(0, min(counts) - finished)


def _load(model: str, loading: dict[str, Any], progress: Progress) -> Engine:
    progress.report(f"loading {model}")
    from longspec.engine import Engine

    signals.check()
    imported = perf_counter()
    if not progress.drawn:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    engine = Engine.load(model, report=progress.report, **loading)
    signals.check()
    seconds = {"load_s": perf_counter() - BEGAN, "import_s": imported - BEGAN}
    engine.load_seconds = {**engine.load_seconds, **seconds}
    return engine


def _identity(engine: Engine) -> dict[str, str]:
    """What else makes an answer what it is, in the words of an error."""
    from longspec.model.identity import identity

    own = identity(engine.model)
    return {
        "weights": own["model"],
        "tokenizer": own["tokenizer"],
        "dtype": own["dtype"],
        "strictness": own["strictness"],
        "cache": engine.cache_name,
    }


def _noted(records: Iterator[Item | Fault], progress: Progress) -> Iterator[Item | Fault]:
    """The records, while each new field that says nothing to us is named once."""
    named: set[str] = set()
    for record in records:
        for field in record.unknown if isinstance(record, Item) else ():
            if field not in named and len(named) < _UNKNOWN_NOTES:
                named.add(field)
                progress.say(f"the field {field[:100]!r} is left aside, first in record {record.index + 1}")
        yield record


class _Run:
    """The loop around a job: results to the file, figures to the eye, signals to an orderly end."""

    def __init__(
        self, job: Job, out: Output, tally: Tally, progress: Progress, max_errors: int | None, left: int, openai: bool
    ) -> None:
        self.job = job
        self.out = out
        self.tally = tally
        self.progress = progress
        self.max_errors = max_errors
        self.left = left
        self.openai = openai
        self._drawn = self._noted = perf_counter()

    def go(self) -> None:
        """Raises Interrupted once what could be finished is finished."""
        whole = True  # no pass was left half done
        try:
            while self.job.admitting or self.job.running:
                for result in self.job.admit():
                    self._write(result)
                with signals.deferred():
                    whole = False
                    results = self.job.step()
                    whole = True
                    for result in results:
                        self._keep(result)
                self._check_errors()
                self._show()
        except signals.Interrupted:
            if whole:
                signals.answer()
                self._drain()
            raise

    def _drain(self) -> None:
        """Finish what is running, for a few seconds; another signal ends that at once."""
        end = perf_counter() + _DRAIN_SECONDS
        self.job.close()
        if self.job.running:
            self.progress.say(f"finishing {self.job.running} texts, for at most {_DRAIN_SECONDS:.0f} s; again to stop now")
        while self.job.running and perf_counter() < end:
            for result in self.job.step():
                self._write(result)

    def _write(self, result: Result) -> None:
        with signals.deferred():
            self._keep(result)

    def _keep(self, result: Result) -> None:
        self.out.write(line(result, openai=self.openai))
        self.tally.add(result)

    def _check_errors(self) -> None:
        if self.max_errors is not None and self.tally.failed > self.max_errors:
            raise LongspecError(
                f"{self.tally.failed:,} lines failed, and --max-errors is {self.max_errors:,}; {self.out.path} says why "
                "of each, and the same command goes on from there."
            )

    def _show(self) -> None:
        now = perf_counter()
        if self.progress.drawn and now - self._drawn > _DRAW_SECONDS:
            self._drawn = now
            self.progress.report(self.tally.stage(self.job.tokens), self.tally.done, self.left)
        elif not self.progress.drawn and now - self._noted > _NOTE_SECONDS:
            self._noted = now
            self.progress.say(self.tally.stage(self.job.tokens))
