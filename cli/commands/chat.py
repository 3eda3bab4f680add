"""`longspec chat`: a conversation at a terminal, or line by line through a pipe.

Declares the command and puts the pieces together: a `Conversation` over an engine, lines to read, and the `Dialogue`
between them.
"""

from __future__ import annotations

import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec.cli import BEGAN
from longspec.cli.io.chat_loop import COMMANDS, Dialogue
from longspec.cli.io.colour import can_colour
from longspec.cli.io.line_editor import PipedLines, TypedLines
from longspec.cli.io.progress import Progress
from longspec.cli.io.prompt_input import checked
from longspec.cli.io.stream_answer import load
from longspec.cli.options import conflicts as precedence
from longspec.cli.options import reasoning as reasoning_options
from longspec.cli.options import shared as options

if TYPE_CHECKING:
    from longspec.engine.engine import Engine
    from longspec.engine.options import Options

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


ShowDrafts = Annotated[
    bool,
    typer.Option(
        "--show-drafts/--no-show-drafts",
        rich_help_panel="Output",
        help="Colour what came from a draft, where stdout is a terminal.",
    ),
]


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
    hide_reasoning: reasoning_options.HideReasoning = False,
    reasoning_budget: reasoning_options.ReasoningBudget = None,
    effort: reasoning_options.Effort = None,
    stop_loops: reasoning_options.StopLoops = False,
    show_drafts: ShowDrafts = False,
    quiet: options.Quiet = False,
    stats: options.Stats = False,
) -> None:
    """Hold a conversation.

    At a terminal, messages are typed; from a pipe, each line is one.
    """
    writing: Options = {
        "system": checked(system, "--system") if system else None,
        "raw": False,
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
    quiet, stats = precedence.reporting(ctx, quiet, stats)
    said = writing["system"]
    settings = {name: value for name, value in writing.items() if name not in ("system", "raw")}

    typed = sys.stdin is not None and os.isatty(0)
    with Progress(model, quiet=quiet) as progress:

        def engine(name: str, began: float | None = None) -> Engine:
            progress.model = name
            return load(name, loading, perf_counter() if began is None else began, progress)

        loaded = engine(model, BEGAN)
        progress.stop()
        from longspec.engine.conversation import Conversation

        conversation = Conversation(loaded, system=said, **settings)
        lines = TypedLines("> ", [usage.split()[0] for usage in COMMANDS]) if typed else PipedLines()
        if typed:
            progress.say(f"talking with {loaded.model.name}; /help says how, Ctrl-D ends")
        colours = show_drafts and can_colour()
        Dialogue(conversation, lines, progress, engine, colours=colours, stats=stats, hide=hide_reasoning).hold()
