"""`longspec bench`: measurements of this machine, as a table and as JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec.cli import options, readers
from longspec.cli.command import Command, Group
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.engine import Engine

__all__ = ["bench"]

bench = typer.Typer(cls=Group, add_completion=False, rich_markup_mode=None, help="Measure, and print a table.")


Output = Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Write the results as JSON.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw them (.svg or .png).")]


@bench.command("cache", cls=Command)
def cache(
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="The text that is read and continued.")],
    model: options.Model = "smollm2",
    dtype: options.Dtype = "auto",
    context: Annotated[
        list[Any] | None,
        typer.Option(
            "--context", metavar="N", parser=readers.whole(256), help="Tokens of context, 256 or more; may be repeated."
        ),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", metavar="NAME", help="A cache; may be repeated. All, if left out.")
    ] = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Compare the kinds of cache: bytes per token, perplexity, a needle test, tokens per second."""
    from longspec.bench.cache import KINDS, measure
    from longspec.engine import Engine

    if unknown := [name for name in kind or [] if name not in KINDS]:
        raise UsageError(f"The cache {unknown[0]!r} is not known; use one of: {', '.join(KINDS)}.")
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error.reason
        raise UsageError(f"{text} can't be read as text: {why}.") from error
    engine = Engine.load(model, drafter="none", dtype=dtype)
    typer.echo("cache    context  bytes/token  perplexity  needles  tokens/s")
    rows: list[dict[str, Any]] = []
    for result in measure(engine, words, sorted(context or [512, 2048, engine.context]), kind or KINDS):
        rows.append({name: getattr(result, name) for name in result.__slots__})
        typer.echo(
            f"{result.kind:8} {result.context:7,}  {result.bytes_per_token:11,.0f}  {result.perplexity:10.3f}"
            f"  {sum(result.needles)} of {len(result.needles)}  {result.tokens_per_second:8.1f}"
        )
    if plot is not None:
        from longspec.bench.plot import draw_caches

        draw_caches(rows, plot)
    _end(
        engine,
        "kinds of cache: allocated bytes per committed row, perplexity, needles found, plain steps",
        rows,
        output,
    )


@bench.command("drafters", cls=Command)
def drafters(
    suite: Annotated[
        Path, typer.Option("--suite", metavar="FILE", help="Prompts: objects with `category` and `turns`, one a line.")
    ],
    model: options.Model = "smollm2",
    draft_model: options.DraftModel = None,
    dtype: options.Dtype = "auto",
    cache: Annotated[
        str,
        typer.Option(
            "--cache", metavar="NAME", rich_help_panel="Model and method", help="A kind of cache; dense, if left out."
        ),
    ] = "dense",
    drafter: Annotated[
        list[str] | None, typer.Option("--drafter", metavar="NAME", help="May be repeated. auto, if left out.")
    ] = None,
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    control: options.Control = "goodput",
    prompts: Annotated[
        int | None, typer.Option("--prompts", metavar="N", parser=readers.whole(1), help="Of each category; else all.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", parser=readers.whole(1), help="Of each answer.")
    ] = 128,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Beside them, transformers' generate with its prompt lookup.")
    ] = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Compare drafters with plain decoding, prompt by prompt in turns, by category."""
    from longspec.bench.drafters import measure, prompt_lookup, read_suite, sample
    from longspec.bench.plot import draw_drafters
    from longspec.drafters import DRAFT_TOKENS
    from longspec.engine import Engine
    from longspec.model.load import open_model

    asked = read_suite(suite)
    asked = sample(asked, prompts) if prompts else asked
    loaded = open_model(model, dtype=dtype).load()
    smaller = open_model(draft_model, dtype=loaded.dtype).load() if draft_model else None
    engines = {
        name: Engine(
            loaded,
            drafter=name,
            cache=cache,
            draft_tokens=num_speculative_tokens or DRAFT_TOKENS,
            control=control,
            draft_model=smaller if name == "auto" or "model" in name.split("+") else None,
        )
        for name in dict.fromkeys(["none", *(drafter or ["auto"])])
    }
    peers = {}
    if transformers:
        from longspec.model.hub import find

        if (folder := find(model).folder) is None:
            raise UsageError("transformers reads a model's folder; this model is a single file.")
        peers["transformers prompt lookup"] = prompt_lookup(
            _readable(folder, loaded.dtype), engines["none"], new_tokens
        )
    typer.echo("category           drafter               tokens/step  acceptance  draft s  verify s  tokens/s  ratio")
    rows: list[dict[str, Any]] = []
    totals: dict[str, Any] = {}
    results = list[Any]()
    for result in measure(engines, asked, new_tokens, peers):
        results.append(result)
        totals[result.drafter] = totals[result.drafter] + result if result.drafter in totals else result
        if result.drafter == [*engines, *peers][-1]:
            rows += _table(results)
            results.clear()
    rows += _table([replace(total, category="all") for total in totals.values()])
    if plot is not None:
        draw_drafters(rows, plot)
    _end(engines["none"], "drafters on first turns, one prompt at a time, greedy, in turns", rows, output,
         max_new_tokens=new_tokens, cache=engines["none"].cache_name)  # fmt: skip


def _table(results: list[Any]) -> list[dict[str, Any]]:
    """One category's results as rows, printed."""
    plain = next(result for result in results if result.drafter == "none")
    rows = []
    for r in results:
        row = {name: getattr(r, name) for name in r.__slots__}
        row |= {"tokens_per_second": r.tokens_per_second, "ratio": r.tokens_per_second / plain.tokens_per_second}
        row |= {"tokens_per_step": r.tokens / r.steps, "acceptance": r.accepted / r.drafted if r.drafted else None}
        said = f"{row['acceptance']:10.2f}" if r.drafted else " " * 10
        typer.echo(
            f"{r.category:17}  {r.drafter:20}  {row['tokens_per_step']:11.2f}  {said}  {r.draft_seconds:7.1f}"
            f"  {r.verify_seconds:8.1f}  {r.tokens_per_second:8.1f}  {row['ratio']:5.2f}"
        )
        rows.append(row)
    return rows


def _readable(folder: Path, dtype: str) -> Path:
    """Where transformers finds a checkpoint: of one that came as GGUF, the converted copy."""
    return folder / dtype if (folder / dtype / "config.json").exists() else folder


def _end(engine: Engine, what: str, rows: list[dict[str, Any]], output: Path | None, **more: Any) -> None:
    """The report, to a file and as the last line."""
    import torch

    report = {
        "what": what,
        "model": engine.model.name,
        "dtype": engine.model.dtype,
        **more,
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__},
        "results": rows,
    }
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(report))
