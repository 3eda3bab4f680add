"""`longspec bench`: measurements of this machine, as a table and as JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from longspec.cli import options
from longspec.cli.command import Command, Group
from longspec.errors import UsageError

__all__ = ["bench"]

bench = typer.Typer(cls=Group, add_completion=False, rich_markup_mode=None, help="Measure, and print a table.")


@bench.command("cache", cls=Command)
def cache(
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="The text that is read and continued.")],
    model: options.Model = "smollm2",
    dtype: options.Dtype = "auto",
    context: Annotated[
        list[int] | None, typer.Option("--context", metavar="N", help="Tokens of context; may be repeated.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", metavar="NAME", help="A cache; may be repeated. All, if left out.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Write the results as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw them (.svg or .png).")] = None,
) -> None:
    """Compare the kinds of cache: bytes per token, perplexity, a needle test, tokens per second."""
    import torch

    from longspec.bench.cache import KINDS, measure
    from longspec.engine import Engine

    if unknown := [name for name in kind or [] if name not in KINDS]:
        raise UsageError(f"The cache {unknown[0]!r} is not known; use one of: {', '.join(KINDS)}.")
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{text} can't be read as text: {error}.") from error
    engine = Engine.load(model, drafter="none", dtype=dtype)
    typer.echo("cache    context  bytes/token  perplexity  needles  tokens/s")
    rows: list[dict[str, Any]] = []
    for result in measure(engine, words, sorted(context or [512, 2048, engine.context]), kind or KINDS):
        rows.append({name: getattr(result, name) for name in result.__slots__})
        typer.echo(
            f"{result.kind:8} {result.context:7,}  {result.bytes_per_token:11,.0f}  {result.perplexity:10.3f}"
            f"  {sum(result.needles)} of {len(result.needles)}  {result.tokens_per_second:8.1f}"
        )
    report = {
        "what": "kinds of cache: allocated bytes per committed row, perplexity, needles found, plain steps",
        "model": engine.model.name,
        "dtype": engine.model.dtype,
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__},
        "results": rows,
    }
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        from longspec.bench.plot import draw_caches

        draw_caches(rows, plot)
    typer.echo(json.dumps(report))
