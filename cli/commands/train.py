"""`longspec train`: train a head that drafts for a model, in a folder that an interrupted run goes on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from longspec.cli.io.progress import Progress
from longspec.cli.options import parsers as readers
from longspec.cli.options import shared as options
from longspec.errors import UsageError

__all__ = ["EPILOG", "train"]

EPILOG = """\b
Examples:
  longspec train clover2 --prompts prompts.jsonl -o head --dry-run
  longspec train clover2 -m smollm2 --prompts prompts.jsonl -o head
  longspec run --drafter ./head "Why is the sky blue?"

\b
The model answers the prompts, and the head learns to foresee the answers. What
it will take is said before it starts. Interrupted or killed, the same command
goes on. The report goes to stdout, and to report.json in the folder.
"""

_TRAINING = "Training"


def train(
    head: Annotated[
        str, typer.Argument(metavar="HEAD", rich_help_panel=_TRAINING, help="What to train: clover or clover2.")
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE",
            rich_help_panel=_TRAINING,
            help='What the model answers: a line for each, an object with a "prompt", or with "turns".',
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", rich_help_panel=_TRAINING, help="The head, and the work on it."),
    ],
    steps: Annotated[
        int,
        typer.Option(
            "--steps", metavar="N", parser=readers.whole(1), rich_help_panel=_TRAINING, help="Steps; 2000 if left out."
        ),
    ] = 2000,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens",
            metavar="N",
            parser=readers.tokens,
            rich_help_panel=_TRAINING,
            help="Tokens that the model writes; 1000k if left out.",
        ),
    ] = 1000 * 1024,
    invent: Annotated[
        int,
        typer.Option(
            "--invent",
            metavar="N",
            parser=readers.whole(0),
            rich_help_panel=_TRAINING,
            help="Of a hundred texts, N answer a prompt that the model invents itself; 0 if left out.",
        ),
    ] = 0,
    depth: Annotated[
        int,
        typer.Option(
            "--depth",
            metavar="N",
            parser=readers.whole(1),
            rich_help_panel=_TRAINING,
            help="Tokens that are drafted behind each other; 5 if left out.",
        ),
    ] = 5,
    draft_vocab: Annotated[
        int,
        typer.Option(
            "--draft-vocab",
            metavar="N",
            parser=readers.whole(0),
            rich_help_panel=_TRAINING,
            help="Draft only the N most frequent tokens; 16384 if left out, 0 is all.",
        ),
    ] = 16384,
    first: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="HEAD",
            rich_help_panel=_TRAINING,
            help="Go on from this head's folder, with the tokens that it drafts; an untrained one if left out.",
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8/--no-int8", rich_help_panel=_TRAINING, help="Store the head's matrices as int8."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run/--no-dry-run", rich_help_panel=_TRAINING, help="Say what it would take, and do nothing."
        ),
    ] = False,
    model: options.Model = "smollm2",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a head that drafts for a model, on what the model answers."""
    with Progress(model, quiet=quiet) as progress:
        progress.report(f"loading {model}")
        from longspec.heads import KINDS
        from longspec.model.load import native_dtype, open_model
        from longspec.training.course import start
        from longspec.training.distil import read_prompts
        from longspec.training.plan import make_plan
        from longspec.training.train import Recipe

        if head not in KINDS:
            raise UsageError(f"There is no head named {head!r}; use one of: {', '.join(KINDS)}.")
        read = read_prompts(prompts)
        opened, writer = open_model(model, dtype=dtype, device=device, report=progress.report), None
        opened.set_threads(threads)
        if dtype == "auto" and opened.dtype == "int8":  # codes have no gradients, and write several times as fast
            writer, dtype = opened.load(report=progress.report), native_dtype(opened.device)
            opened = open_model(model, dtype=dtype, device=device, report=progress.report)
        loaded = opened.load(report=progress.report)
        recipe = Recipe(head, steps, tokens, depth, draft_vocab, seed or 0, invented=invent)
        sampling = _sampling(loaded.defaults, temperature, recipe.seed)
        course = start(loaded, recipe, output, read, sampling, writer, first)
        if int(os.environ.get("RANK", "0")) == 0:
            progress.report("measuring")
            progress.say(str(make_plan(loaded, recipe, course.prompts, course.held, course.options, course.writer)))
        if dry_run:
            return
        said = course.run(progress.report, int8=int8)
    if said is None:  # one of several processes, and not the one that speaks
        return
    typer.echo(json.dumps({**said, "folder": str(output)}, ensure_ascii=False) if as_json else _table(said, output))


def _sampling(defaults: Any, temperature: float | None, seed: int) -> dict[str, Any]:
    """As the model is used; a greedy one is sampled all the same, so that a prompt can be answered again."""
    chosen: dict[str, Any] = {"seed": seed}
    if temperature is not None:
        chosen["temperature"] = temperature
    elif not defaults.get("do_sample"):
        chosen["temperature"] = 0.8
    return chosen


def _table(said: dict[str, Any], folder: Path) -> str:
    shares = "  ".join(f"{share:.2f}" for share in said["accuracy"])
    return (
        f"{said['tokens_per_step']:.2f} tokens per step on prompts that it wasn't trained on, "
        f"{said['untrained_tokens_per_step']:.2f} untrained; {said['steps']:,} steps on {said['texts']:,} texts\n"
        f"Right behind true tokens, by depth: {shares}\n"
        f"Kept in {folder}: longspec run --drafter {_path(folder)}"
    )


def _path(folder: Path) -> str:
    """So that it is read as a path, not as a name."""
    return str(folder) if folder.is_absolute() or len(folder.parts) > 1 else f"./{folder}"
