"""`longspec chat`: a conversation at a terminal, or line by line through a pipe.

Declares the command and connects its parts: a `Conversation` over an engine, a reader of lines, and the `Dialogue`
between them.
"""

from __future__ import annotations

import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from longspec.cli import BEGAN
from longspec.cli.io.chat_loop import COMMANDS, Dialogue, short_name
from longspec.cli.io.colour import can_colour
from longspec.cli.io.line_editor import PipedLines, TypedLines
from longspec.cli.io.page import page
from longspec.cli.io.progress import Progress
from longspec.cli.io.server_client import SERVED, Talk, talk
from longspec.cli.io.stream_answer import load
from longspec.cli.options.groups import Only, Without, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.reporting import NO_SERVER, RAW_OUTPUT, Reporting
from longspec.cli.options.writing import Framing, Reasoning, SamplingOptions, text_options

if TYPE_CHECKING:
    from longspec.engine.conversation import Conversation
    from longspec.engine.engine import Engine

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


@group("Output")
class Showing:
    """The display of answers at a terminal, and who writes them."""

    show_drafts: bool = option(False, "Colour what came from a draft, where stdout is a terminal.")
    raw_output: bool = RAW_OUTPUT
    no_server: bool = NO_SERVER


def chat(
    ctx: typer.Context,
    framing: Annotated[Framing, Only("system", "allow_special_tokens")],
    loading: Annotated[Loading, Without("draft_from", "remember")],
    sampling: SamplingOptions,
    reasoning: Reasoning,
    showing: Showing,
    reporting: Annotated[Reporting, Without("as_json")],
) -> None:
    """Hold a conversation.

    At a terminal, messages are typed; from a pipe, each line is one.
    """
    writing = text_options(ctx, framing, sampling, reasoning)
    options = loading.engine_options(ctx)
    reporting = reporting.settled(ctx)
    system = writing["system"]
    settings = {name: value for name, value in writing.items() if name not in ("system", "raw")}

    typed = sys.stdin is not None and os.isatty(0)
    with Progress(loading.model, quiet=reporting.quiet, verbose=reporting.verbose) as progress:

        def engine(name: str, began: float | None = None) -> Engine:
            progress.model = name
            return load(name, options, perf_counter() if began is None else began, progress)

        colours = showing.show_drafts and can_colour()
        conversation: Conversation | Talk | None = None
        if not (showing.no_server or colours):  # a server doesn't say what was drafted
            conversation = talk(loading.model, options, system, settings)
        if conversation is None:
            loaded = engine(loading.model, BEGAN)
            progress.stop()
            from longspec.engine.conversation import Conversation

            conversation = Conversation(loaded, system=system, **settings)
        elif reporting.verbose:
            progress.say(SERVED)
        lines = TypedLines("> ", [usage.split()[0] for usage in COMMANDS]) if typed else PipedLines()
        if typed:
            name = loading.model if isinstance(conversation, Talk) else conversation.engine.model.name
            progress.say(f"talking with {short_name(name)}; ? says how, exit or Ctrl-D ends")
        output = page(raw=showing.raw_output or colours)
        Dialogue(
            conversation,
            lines,
            progress,
            engine,
            loading.model,
            output=output,
            colours=colours,
            stats=reporting.stats,
            hide=reasoning.hide_reasoning,
        ).hold()
