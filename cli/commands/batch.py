"""`longspec batch`: many prompts from a file, their answers to a file, resumable at any point.

Everything is checked before the model is loaded: the input's format, the output's lines, the settings of the first
run. stdout stays empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec import __version__
from longspec.batch import FORMATS, beside, is_parts, meta_path
from longspec.cli import BEGAN
from longspec.cli.io import signals
from longspec.cli.io.distinct import refuse_same_files
from longspec.cli.io.progress import Progress
from longspec.cli.io.stream_answer import load
from longspec.cli.options.cluster import Cluster
from longspec.cli.options.groups import Only, Without, argument, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.parsers import whole
from longspec.cli.options.reporting import Reporting
from longspec.cli.options.writing import Framing, Reasoning, SamplingOptions, text_options
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.batch.inputs import Input
    from longspec.batch.marks import Marks
    from longspec.batch.output import Output
    from longspec.batch.parts import Parts
    from longspec.batch.requests import Fault, Item
    from longspec.batch.tally import Tally
    from longspec.cli.io.batch_loop import Loop, Results
    from longspec.cli.io.cluster_loop import ClusterLoop
    from longspec.engine.options import Options

__all__ = ["EPILOG", "batch"]

EPILOG = """\b
Examples:
  longspec batch prompts.jsonl -o answers.jsonl --max-new-tokens 200
  longspec batch reviews.csv -o labels.jsonl --template 'Is this review kind? {text}'
  longspec batch docs/*.md -o summaries.jsonl --template 'Summarise in one sentence: {text}'
  find . -name '*.py' -print0 | longspec batch --files-from - -0 -o out.jsonl --template 'What does this do? {text}'
  longspec batch prompts.jsonl -o answers.jsonl --on ray:head:6379 --threads 8

\b
The same command again goes on where it ended. A line that can't be answered becomes a line with its error.
Exit code 1 says that there are such lines, 130 that it was interrupted.
"""

_UNKNOWN_NOTES = 8


@group("Input and output")
class Files:
    """Input, output, and the options of resuming."""

    inputs: list[str] | None = argument(
        None,
        "A file of prompts (.jsonl, .csv, .tsv, .parquet, .txt), its URL, - for standard input, or many files of one "
        "prompt each.",
        metavar="IN...",
    )
    output: str | None = option(
        None,
        "Where the answers go, one line of JSON each; must be given. What is there is gone on with. A name that ends "
        "with / or .parquet, or a URL (s3://...), is a folder of files.",
        short="-o",
        metavar="OUT",
        once=True,
    )
    files_from: str | None = option(
        None,
        "Read the names of files of one prompt each from LIST, or from standard input (-).",
        metavar="LIST",
        once=True,
    )
    null: bool = option(False, "The names in LIST end with NUL.", short="-0", once=True)
    form: str | None = option(
        None,
        f"What IN is, if its name and first line don't tell: {', '.join(FORMATS)}.",
        flag="--format",
        metavar="NAME",
    )
    template: str | None = option(
        None,
        "The prompt of each record, with fields in braces: a column, a key, {text} of a line or a file, {path}.",
        metavar="TEXT",
        once=True,
    )
    in_order: bool = option(False, "Write answers in the order of the input, not as they finish.")
    limit: int | None = option(
        None, "Take the first N records of the input only.", metavar="N", parser=whole(1), once=True
    )
    batch_size: int | None = option(
        None,
        "Write N texts side by side; 16 if left out. The answers don't depend on it.",
        metavar="N",
        parser=whole(1),
    )
    max_errors: int | None = option(None, "Give up when more than N lines have failed.", metavar="N", parser=whole(0))
    retry_errors: bool = option(False, "Take the errors out of OUT and try those lines again.", once=True)
    continue_anyway: bool = option(
        False, "Go on in OUT although it was begun with another input, model or setting.", once=True
    )
    summary: str | None = option(
        None, "Write what the run did, in numbers, to FILE as JSON.", metavar="FILE", once=True
    )

    @property
    def name(self) -> str:
        """The output, checked as far as the options allow."""
        if self.output is None:
            example = f"longspec batch {(self.inputs or ['prompts.jsonl'])[0]} -o answers.jsonl"
            raise UsageError(f"The answers need a file: {example}.")
        if self.output == "-":
            raise UsageError(
                "-o - is no file that can be gone on with; name a file for the answers, or ./- for one so named."
            )
        if self.retry_errors and self.in_order:
            raise UsageError("--retry-errors adds lines at the end, which --in-order forbids; leave one out.")
        return self.output

    def check(self, *read: str | None) -> None:
        """Raise UsageError where a file that is written is another one too; `read`: those that others name."""
        path, read = Path(self.name), (*(self.inputs or []), self.files_from, *read)
        written = {"the output": path, "the output's record": meta_path(path), "its copy": beside(path)}
        refuse_same_files({**({} if is_parts(self.name) else written), "the summary": self.summary}, read)

    @property
    def width(self) -> int:
        """Texts side by side."""
        from longspec.engine.scheduler import WIDTH

        return self.batch_size or WIDTH

    def opened(self) -> Output | Parts:
        from longspec.batch.output import Output
        from longspec.batch.parts import Parts

        return Parts(self.name) if is_parts(self.name) else Output(Path(self.name))


def batch(
    ctx: typer.Context,
    files: Files,
    framing: Framing,
    loading: Annotated[Loading, Without("draft_from", "remember")],
    sampling: SamplingOptions,
    reasoning: Annotated[Reasoning, Without("hide_reasoning")],
    cluster: Cluster,
    reporting: Annotated[Reporting, Only("quiet", "verbose")],
) -> None:
    """Answer many prompts, and write each answer as a line of JSON.

    A line of the input is an object with `prompt` or `messages`, and with `id` and options of its own if it likes.
    """
    from longspec.batch.about import About  # imported late, as all below: other commands start sooner
    from longspec.batch.inputs import open_input
    from longspec.batch.marks import fresh

    cluster.check(files.inputs or [], files.files_from, in_order=files.in_order)
    writing = text_options(ctx, framing, sampling, reasoning)
    options, reporting = loading.engine_options(ctx), reporting.settled(ctx)
    files.check(loading.model, loading.skip_set)
    width = files.batch_size
    if loading.memory is not None:  # each text is planned at the model's whole context, as many as fit
        width = options["texts"] = files.width
    with (
        open_input(
            files.inputs or [], form=files.form, template=files.template, files_from=files.files_from, null=files.null
        ) as source,
        Progress(loading.model, quiet=reporting.quiet, verbose=reporting.verbose) as progress,
        files.opened() as out,
    ):
        about = About(out, anyway=files.continue_anyway)
        settings = _settings(files, source, writing)
        about.check(settings)
        progress.report("reading what is there")
        finished, failed = out.finished(retry_errors=files.retry_errors)
        records = _noted(fresh(islice(source.records, files.limit), finished), progress)
        first = next(records, None)
        if first is None:
            progress.say(f"nothing is left to do: {len(finished):,} lines are in {out.path}")
            _summarise(files.summary, _tally(finished, failed), "none", complete=True)
            raise typer.Exit(1 if failed else 0)
        from longspec.cli.io.batch_loop import Results

        def begin(identity: Mapping[str, str]) -> None:
            about.check(identity)
            about.write({"longspec": __version__, "model": loading.model, **settings, **identity})

        left = _left(source, files.limit, len(finished))
        results = Results(out, _tally(finished, failed), progress, files.max_errors, left)
        task = _Task(loading.model, options, writing, width, openai=source.format == "openai")
        if cluster.on is None:
            _here(task, files, chain((first,), records), results, begin)
        else:
            _there(task, files, cluster, finished, results, begin)
    if results.tally.failed + results.tally.failed_before:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Task:
    """What answers depend on, and how many are written side by side."""

    model: str
    loading: dict[str, Any]
    writing: Options
    width: int | None
    openai: bool


def _here(
    task: _Task,
    files: Files,
    records: Iterator[Item | Fault],
    results: Results,
    begin: Callable[[Mapping[str, str]], None],
) -> None:
    """Answer the records in this process."""
    engine = load(task.model, task.loading, BEGAN, results.progress)
    from longspec.batch.about import identity
    from longspec.batch.job import Job
    from longspec.cli.io.batch_loop import Loop

    begin(identity(engine))
    job = Job(engine, records, task.writing, task.width, in_order=files.in_order)
    _run(Loop(job, results, openai=task.openai), files.summary)


def _there(
    task: _Task,
    files: Files,
    cluster: Cluster,
    finished: Marks,
    results: Results,
    begin: Callable[[Mapping[str, str]], None],
) -> None:
    """Answer the records on a Ray cluster."""
    results.progress.report("looking for Ray")
    from longspec.cli.io.cluster_loop import ClusterLoop
    from longspec.ray.actor import Order
    from longspec.ray.cluster import connected, nodes, places
    from longspec.ray.stream import Source, group_size, reports

    folder, width = os.getcwd(), files.width
    with connected(cluster.address):
        found = places(nodes(), device=task.loading["device"], threads=task.loading["threads"], actors=cluster.actors)
        short = not found.gpus and found.actors < (asked := cluster.actors or 0)
        more = f"; {asked} were asked for, which takes a smaller --threads" if short else ""
        results.progress.say(f"{found} for {task.model}{more}")
        source = Source(
            tuple(files.inputs or ()),
            files.form,
            files.template,
            files.files_from,
            files.null,
            files.limit,
            folder,
            group_size(results.left, found.actors * width),
        )
        loading = {**task.loading, **found.options}
        order = Order(__version__, task.model, loading, task.writing, task.width, task.openai, folder)
        loop = ClusterLoop(reports(source, finished, order, found, width), results, finished, begin)
        _run(loop, files.summary)


def _run(loop: Loop | ClusterLoop, summary: str | None) -> None:
    """Answer all records; print the closing line however it ends."""
    complete, results = False, loop.results
    try:
        loop.go()
        complete = True
    finally:
        results.progress.stop()
        with signals.deferred():
            sentence, failed = results.tally.sentence(loop.drafter), results.tally.failed
            results.progress.say(f"{sentence}; why they failed stands in {results.out.path}" if failed else sentence)
            _summarise(summary, results.tally, loop.drafter, complete=complete, more=loop.report())


def _settings(files: Files, source: Input, writing: Options) -> dict[str, Any]:
    """The settings beside the model that an answer depends on: stored beside the output, and compared on resuming."""
    return {
        "input": source.digest,
        "format": source.format,
        "template": files.template,
        "order": "the input's" if files.in_order else "as they finish",
        **writing,
        # None as in metadata older than these options.
        "stop_loops": writing["stop_loops"] or None,
        "allow_special_tokens": writing["allow_special_tokens"] or None,
    }


def _tally(finished: Marks, failed: int) -> Tally:
    from longspec.batch.tally import Tally

    return Tally(len(finished), failed)


def _summarise(
    summary: str | None, tally: Tally, drafter: str, *, complete: bool, more: Mapping[str, Any] | None = None
) -> None:
    if summary is not None:
        from longspec.batch.about import write_json

        write_json(Path(summary), {"complete": complete, **tally.report(drafter), **(more or {})})


def _left(source: Input, limit: int | None, finished: int) -> int:
    """The approximate number of records to answer; 0 if unknown."""
    if source.count is None and limit is None:
        return 0
    counts = [count for count in (source.count, limit) if count is not None]
    return max(0, min(counts) - finished)


def _noted(records: Iterator[Item | Fault], progress: Progress) -> Iterator[Item | Fault]:
    """The records; prints a note once for each ignored field."""
    from longspec.batch.requests import Item

    named: set[str] = set()
    for record in records:
        for field in record.unknown if isinstance(record, Item) else ():
            if field not in named and len(named) < _UNKNOWN_NOTES:
                named.add(field)
                progress.say(f"the field {field[:100]!r} is left aside, first in record {record.index + 1}")
        yield record
