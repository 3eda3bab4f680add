"""`longspec run`: one prompt in, one answer out, streamed.

Reads the prompt before it loads anything, so that a wrong one costs no time. Everything but the answer goes to stderr.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

from longspec.cli import BEGAN, options, remote, signals
from longspec.cli.command import given
from longspec.cli.output import Output
from longspec.cli.progress import Progress
from longspec.cli.prompt import checked, read_prompt
from longspec.errors import LongspecError, UsageError

if TYPE_CHECKING:
    from longspec.answer import Answer
    from longspec.engine import Engine
    from longspec.options import Options
    from longspec.session import Session
    from longspec.text import Vocabulary

__all__ = ["EPILOG", "run"]

EPILOG = """\b
Examples:
  longspec run "Why is the sky blue?"
  cat report.txt | longspec run "Summarise this in three sentences:" > summary.txt
  longspec run -f question.md --temperature 0.8 --seed 1 --stats
  longspec run --json --max-new-tokens 64 "List the planets." | jq -r .text

\b
The answer goes to stdout, and ends with a newline; everything else goes to stderr.
Every flag has its opposite (--no-stats, --stream) for what the environment or config.toml sets.
"""


def run(
    ctx: typer.Context,
    prompt: options.Prompt = None,
    file: options.File = None,
    no_stdin: options.NoStdin = False,
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
    no_server: options.NoServer = False,
    no_stream: options.NoStream = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    stats: options.Stats = False,
) -> None:
    """Answer one prompt.

    The prompt is the argument, then the files, then what is piped in, with a blank line between them.
    """
    system = system or None
    if raw and system is not None:
        if _yields(ctx, "system", to="raw"):
            system = None
        elif _yields(ctx, "raw", to="system"):
            raw = False
        else:
            raise UsageError("--raw sends the prompt without roles, so there is no place for --system; leave one out.")
    if quiet and stats:
        if _yields(ctx, "stats", to="quiet"):
            stats = False
        elif _yields(ctx, "quiet", to="stats"):
            quiet = False
        else:
            raise UsageError("--quiet keeps stderr empty and --stats writes there; leave one out.")
    if num_speculative_tokens is not None and drafter == "none":
        if not _yields(ctx, "num_speculative_tokens", to="drafter"):
            raise UsageError("--num-speculative-tokens has no effect with --drafter none; leave one out.")
        num_speculative_tokens = None
    if temperature == 0 and given(ctx, "temperature"):  # greedy: what settings say of sampling gives way
        top_p = top_p if given(ctx, "top_p") else None
        top_k = top_k if given(ctx, "top_k") else None
        min_p = min_p if given(ctx, "min_p") else None
    writing: Options = {
        "system": system and checked(system, "--system"),
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

    output = Output()
    with Progress(model, quiet=quiet) as progress:
        asked = perf_counter()
        text = read_prompt(prompt, file or [], no_stdin=no_stdin, say=progress.say)
        began = BEGAN + perf_counter() - asked  # waiting for a pipe isn't the answer's time
        how = {"stream": not (no_stream or as_json), "text": not as_json}
        answer: Answer | remote.Reported
        served = None
        if not no_server:
            served = remote.write(model, loading, text, writing, output, progress, began=began, **how)
        if served is not None:
            answer, interrupted = served
        else:
            if memory is not None:
                loading["tokens"] = lambda vocabulary: _length(vocabulary, text, writing)
            engine = _load(model, loading, began, progress)
            if engine.plan is not None:
                progress.say(str(engine.plan))
            session = engine.open(text, **writing)
            interrupted = _write(engine, session, output, progress, **how)
            progress.stop()
            for note in session.notes:
                progress.say(note)
            answer = engine.answer(session, began)
        if as_json:
            output.write(json.dumps(answer.report(), ensure_ascii=False) + "\n")
        if stats:
            progress.say(_statistics(answer))
    if interrupted is not None and answer.finish_reason == "interrupted":
        raise interrupted


def _yields(ctx: typer.Context, name: str, *, to: str) -> bool:
    """A setting gives way to what contradicts it on the command line; two flags there are refused."""
    return given(ctx, to) and not given(ctx, name)


def _length(vocabulary: Vocabulary, prompt: str, writing: Options) -> int | None:
    """How long prompt and answer may become; None where only the model's context ends them."""
    from longspec.text import encode

    asked = writing["max_new_tokens"]
    if asked is None:
        return None
    return len(encode(vocabulary, prompt, writing["system"], raw=writing["raw"])) + asked


def _load(model: str, options: dict[str, Any], began: float, progress: Progress) -> Engine:
    """The engine, with its seconds counted from `began`: imports are most of a small model's load."""
    progress.report(f"loading {model}")
    from longspec.engine import Engine

    signals.check()
    imported = perf_counter()
    if not progress.drawn:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    engine = Engine.load(model, report=progress.report, **options)
    signals.check()
    seconds = {"load_s": perf_counter() - began, "import_s": imported - began}
    engine.load_seconds = {**engine.load_seconds, **seconds}
    return engine


def _write(
    engine: Engine, session: Session, output: Output, progress: Progress, *, stream: bool, text: bool
) -> signals.Interrupted | None:
    """Write the session to its end, or to a signal, which is given back. What there is of its text is on stdout then.

    stream: each piece as it becomes certain. text: at least at the end.
    """
    shown, interrupted = 0, None
    try:
        for done in engine.prefill(session):
            progress.report("reading the prompt", done, session.prompt_length - 1)
        while session.finish_reason is None:
            with signals.deferred():
                [commit] = engine.step([session])
            if stream and commit.text:
                progress.stop()
                shown += len(commit.text)
                output.write(commit.text)
            if not stream or output.is_file:
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
        output.write(session.text[shown:])
        output.end_line()
    return interrupted


def _statistics(answer: Answer | remote.Reported) -> str:
    """The closing line."""
    count, bets, timing = answer.usage["completion_tokens"], answer.speculation, answer.timing
    parts = [f"{count:,} tokens in {timing['decode_s']:.1f} s"]
    if timing["tokens_per_second"] is not None:
        parts[0] += f" ({timing['tokens_per_second']:.1f} tokens/s)"
    parts.append(f"{bets['tokens_per_step']:.2f} tokens per step with {bets['drafter']}")
    if bets["drafted"]:
        parts.append(f"acceptance {bets['accepted'] / bets['drafted']:.2f}")
    if timing["time_to_first_token_s"] is not None:
        parts.append(f"first token after {timing['time_to_first_token_s']:.1f} s")
    parts.append(f"ended by {answer.finish_reason}")
    return ", ".join(parts)
