"""`longspec run`: one prompt in, one answer out, streamed; or every line of standard input, one by one.

Reads the prompt before it loads anything, so that a wrong one costs no time. Everything but the answer goes to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

from longspec.cli import BEGAN, options, precedence, prompts
from longspec.cli.lines import answer_lines
from longspec.cli.outfile import OutputFile
from longspec.cli.output import Output
from longspec.cli.progress import Progress
from longspec.cli.prompt import checked, joined, read_head, read_lines, read_prompt
from longspec.cli.writing import load, statistics, write
from longspec.errors import LongspecError, UsageError

if TYPE_CHECKING:
    from longspec.engine import Options
    from longspec.template import Template
    from longspec.text import Vocabulary

__all__ = ["EPILOG", "run"]

EPILOG = """\b
Examples:
  longspec run "Why is the sky blue?"
  cat report.txt | longspec run "Summarise this in three sentences:" > summary.txt
  longspec run -f question.md --temperature 0.8 --seed 1 --stats
  longspec run --json --max-new-tokens 64 "List the planets." | jq -r .text
  git diff --staged | longspec run -t commit-message
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
    template: options.Template = None,
    param: options.Param = None,
    each_line: options.EachLine = False,
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
    prompt_cache: options.PromptCache = None,
    output: options.OutputFile = None,
    no_stream: options.NoStream = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    stats: options.Stats = False,
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
    }
    loading = {
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
    form = _form(template, param or [])
    precedence.writing(ctx, writing, form.defaults)
    precedence.betting(ctx, loading)
    quiet, stats = precedence.reporting(ctx, quiet, stats)
    source = Source(prompt, file or [], no_stdin)
    with Progress(model, quiet=quiet) as progress, _opened(output, progress) as out:
        streamed = not (no_stream or as_json)
        call = Call(model, loading, writing, out, progress, stream=streamed, as_json=as_json, stats=stats)
        failed = (_answer_lines if each_line else _answer)(source, form, call)
    if failed is not None:  # only now: the file has every line that could be answered
        raise failed


@dataclass(frozen=True, slots=True)
class Source:
    """Where the prompt comes from."""

    argument: str | None
    files: Sequence[str]
    no_stdin: bool


@dataclass(frozen=True, slots=True)
class Form:
    """What is made of the prompt that was given: itself, or a template filled with it."""

    template: Template | None
    values: dict[str, str]

    @property
    def defaults(self) -> dict[str, Any]:
        """What the template would have the answer written with."""
        return {} if self.template is None else dict(self.template.defaults)

    @property
    def takes_input(self) -> bool:
        return self.template is None or self.template.takes_input

    def fill(self, text: str | None) -> str:
        return text or "" if self.template is None else self.template.render(text, self.values)


@dataclass(frozen=True, slots=True)
class Call:
    """How it is answered, and where to."""

    model: str
    loading: dict[str, Any]
    writing: Options
    output: Output | OutputFile
    progress: Progress
    stream: bool
    as_json: bool
    stats: bool


def _answer(source: Source, form: Form, call: Call) -> LongspecError | None:
    asked = perf_counter()
    text = _read(source, form, call.progress)
    began = BEGAN + perf_counter() - asked  # waiting for a pipe isn't the answer's time
    loading, output, progress = call.loading, call.output, call.progress
    if loading["memory"] is not None:
        loading = {**loading, "tokens": lambda vocabulary: _length(vocabulary, text, call.writing)}
    engine = load(call.model, loading, began, progress)
    session = engine.open(text, **call.writing)
    interrupted = write(engine, session, output, progress, stream=call.stream, text=not call.as_json)
    progress.stop()
    for note in session.notes:
        progress.say(note)
    answer = engine.answer(session, began)
    if call.as_json:
        output.write(json.dumps(answer.report(), ensure_ascii=False) + "\n")
    if call.stats:
        progress.say(statistics(answer))
    if interrupted is not None and answer.finish_reason == "interrupted":
        raise interrupted
    return None


def _answer_lines(source: Source, form: Form, call: Call) -> LongspecError | None:
    if source.no_stdin:
        raise UsageError("--each-line answers the lines of standard input and --no-stdin forbids it; leave one out.")
    if not form.takes_input:
        raise UsageError(f"The template {_name(form)} takes no input, so no line could change it; drop --each-line.")
    head = read_head(source.argument, source.files)
    return answer_lines(
        read_lines(call.progress.say),
        lambda line: form.fill(joined([head, line])),
        lambda: load(call.model, call.loading, BEGAN, call.progress),
        call.output,
        call.progress,
        call.writing,
        as_json=call.as_json,
        stats=call.stats,
    )


def _read(source: Source, form: Form, progress: Progress) -> str:
    """The prompt."""
    if form.takes_input:
        return form.fill(read_prompt(source.argument, source.files, no_stdin=source.no_stdin, say=progress.say))
    if source.argument is not None or source.files:
        raise UsageError(f"The template {_name(form)} takes no input, and one was given; leave it out.")
    return form.fill(None)


def _form(name: str | None, parameters: Sequence[tuple[str, str]]) -> Form:
    if name is None:
        if parameters:
            raise UsageError("--param gives a template a value, and there is no --template; add one, or leave it out.")
        return Form(None, {})
    template = prompts.load(name)
    values = {name: checked(value, f"--param {name}") for name, value in parameters}
    return Form(template, template.values(values))  # what is missing is said before anything is read


def _name(form: Form) -> str:
    return form.template.name if form.template else ""


def _opened(name: str | None, progress: Progress) -> AbstractContextManager[Output | OutputFile]:
    """Standard output, or the file in its place."""
    return nullcontext(Output()) if name in (None, "-") else OutputFile(checked(name or "", "--output"), progress.say)


def _length(vocabulary: Vocabulary, prompt: str, writing: Options) -> int | None:
    """How long prompt and answer may become; None where only the model's context ends them."""
    from longspec.text import encode

    asked = writing["max_new_tokens"]
    if asked is None:
        return None
    return len(encode(vocabulary, prompt, writing["system"], raw=writing["raw"])) + asked
