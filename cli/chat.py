"""`longspec chat`: a conversation at a terminal, or line by line through a pipe.

Declares the command and puts the pieces together: a `Conversation` over an engine, lines to read, and the `Dialogue`
between them.
"""

from __future__ import annotations

import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

from longspec.cli import BEGAN, options
from longspec.cli.colour import can_colour
from longspec.cli.command import given
from longspec.cli.dialogue import COMMANDS, Dialogue
from longspec.cli.lines import PipedLines, TypedLines
from longspec.cli.progress import Progress
from longspec.cli.prompt import checked
from longspec.cli.run import load, yields
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.engine import Engine, Options

__all__ = ["EPILOG", "chat"]

EPILOG = """\b
Examples:
  longspec chat
  longspec chat -m Qwen/Qwen3-0.6B --system "Answer in one sentence." --show-drafts
  printf 'Name a river.\\nIn which sea does it end?\\n' | longspec chat > answers.txt

\b
/help, typed as a message, lists the commands. Answers go to stdout, all else to stderr.
What was said stays in the cache from turn to turn: only what is new is read.
Every flag has its opposite (--no-stats) for what the environment or config.toml sets.
"""


def chat(
    ctx: typer.Context,
    system: options.System = None,
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
    show_drafts: options.ShowDrafts = False,
    quiet: options.Quiet = False,
    stats: options.Stats = False,
) -> None:
    """Hold a conversation.

    At a terminal, messages are typed; from a pipe, each line is one.
    """
    if quiet and stats:
        if yields(ctx, "stats", to="quiet"):
            stats = False
        elif yields(ctx, "quiet", to="stats"):
            quiet = False
        else:
            raise UsageError("--quiet keeps stderr empty and --stats writes there; leave one out.")
    if num_speculative_tokens is not None and drafter == "none":
        if not yields(ctx, "num_speculative_tokens", to="drafter"):
            raise UsageError("--num-speculative-tokens has no effect with --drafter none; leave one out.")
        num_speculative_tokens = None
    if temperature == 0 and given(ctx, "temperature"):  # greedy: what settings say of sampling gives way
        top_p = top_p if given(ctx, "top_p") else None
        top_k = top_k if given(ctx, "top_k") else None
        min_p = min_p if given(ctx, "min_p") else None
    writing: Options = {
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

    typed = sys.stdin is not None and os.isatty(0)
    with Progress(model, quiet=quiet) as progress:

        def engine(name: str, began: float | None = None) -> Engine:
            progress.model = name
            return load(name, loading, perf_counter() if began is None else began, progress)

        loaded = engine(model, BEGAN)
        progress.stop()
        from longspec.conversation import Conversation

        conversation = Conversation(loaded, system=checked(system or "", "--system") or None, **writing)
        if loaded.plan is not None:
            progress.say(str(loaded.plan))
        lines = TypedLines("> ", [usage.split()[0] for usage in COMMANDS]) if typed else PipedLines()
        if typed:
            progress.say(f"talking with {loaded.model.name}; /help says how, Ctrl-D ends")
        Dialogue(conversation, lines, progress, engine, colours=show_drafts and can_colour(), stats=stats).hold()
