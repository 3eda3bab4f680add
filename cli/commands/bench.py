"""`longspec bench`: measurements of this machine, as a table and as JSON."""

from __future__ import annotations

import json
import platform
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from longspec import __version__
from longspec.cli.io.progress import Progress
from longspec.cli.options import parsers as readers
from longspec.cli.options import shared as options
from longspec.cli.options.typer_classes import Command, Group
from longspec.errors import ContextError, UsageError

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
    from longspec.engine.engine import Engine

    if unknown := [name for name in kind or [] if name not in KINDS]:
        raise UsageError(f"The cache {unknown[0]!r} is not known; use one of: {', '.join(KINDS)}.")
    words = _readable_text(text)
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
        "kinds of cache: allocated bytes per committed row, perplexity, needles found, plain steps",
        rows,
        output,
        model=engine.model.name,
        dtype=engine.model.dtype,
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
    from longspec.engine.engine import Engine
    from longspec.model.load import open_model

    asked = read_suite(suite)
    asked = sample(asked, prompts) if prompts else asked
    opened = open_model(model, dtype=dtype)
    opened.set_threads()
    loaded = opened.load()
    smaller = open_model(draft_model, dtype=loaded.dtype).load() if draft_model else None
    engines = {
        name: Engine(
            loaded,
            drafter=name,
            cache=cache,
            draft_tokens=num_speculative_tokens or DRAFT_TOKENS,
            control=control,
            options={"draft": smaller} if smaller and (name == "auto" or "model" in name.split("+")) else {},
        )
        for name in dict.fromkeys(["none", *(drafter or ["auto"])])
    }
    peers = {}
    if transformers:
        from longspec.model.files.hub import find

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
    _end("drafters on first turns, one prompt at a time, greedy, in turns", rows, output, model=loaded.name,
         dtype=loaded.dtype, max_new_tokens=new_tokens, cache=engines["none"].cache_name)  # fmt: skip


@bench.command("engines", cls=Command)
def engines(
    suite: Annotated[
        Path | None,
        typer.Option("--suite", metavar="FILE", help="Prompts: objects with `category` and `turns`, one a line."),
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", metavar="NAME", help="Of the suite; may be repeated. All, else.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", parser=readers.whole(1), help="Of each category; else all.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="The text that is read and continued.")
    ] = None,
    context: Annotated[
        list[Any] | None,
        typer.Option(
            "--context",
            metavar="N",
            parser=readers.tokens,
            help="Tokens of the text; may be repeated. 512, 2048 and 7000, if left out.",
        ),
    ] = None,
    model: options.Model = "smollm2",
    draft_model: options.DraftModel = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            metavar="NAME",
            help="Of this engine, as drafter/cache/dtype; may be repeated. none, auto and none/auto/bf16, if left out.",
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME",
            help="transformers, lookup, assistant (both transformers too) or llama.cpp; may be repeated. What can be "
            "had, if left out.",
        ),
    ] = None,
    llama_python: Annotated[
        str | None,
        typer.Option("--llama-python", metavar="PATH", help="The interpreter that has llama-cpp-python."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="NAME", help="What ratios are to; transformers, if left out.")
    ] = None,
    batch: Annotated[
        int,
        typer.Option("--batch", metavar="N", parser=readers.whole(1), help="Texts side by side; 1 leaves them out."),
    ] = 8,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", parser=readers.whole(1), help="Of everything.")] = 5,
    new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", parser=readers.whole(2), help="Of each answer.")
    ] = 128,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Compare this engine with transformers and llama.cpp on the CPU, each in a process of its own, in turns."""
    if suite is None and text is None:
        raise UsageError("There is nothing to write: give --suite for chats, --text for long contexts, or both.")
    words = _readable_text(text) if text is not None else ""
    for path in filter(None, (output, plot)):  # now, and not after an hour
        if not path.parent.is_dir():
            raise UsageError(
                f"{path} can't be written: there is no folder {path.parent}; make it, or name another file."
            )
    if plot is not None:
        from longspec.bench.plot import draw_engines, load_matplotlib

        load_matplotlib()
    with Progress(model, quiet=quiet) as progress, ExitStack() as held:
        progress.report("reading the prompts")
        import torch

        from longspec.bench import contenders as who
        from longspec.bench import engines as work
        from longspec.bench.drafters import read_suite
        from longspec.bench.drafters import sample as sampled
        from longspec.model.files.hub import find
        from longspec.model.load import native_dtype, open_model

        asked = read_suite(suite) if suite is not None else {}
        if unknown := [name for name in category or [] if name not in asked]:
            raise UsageError(f"The suite has no category {unknown[0]!r}; it has: {', '.join(asked) or 'none'}.")
        asked = {name: prompts for name, prompts in asked.items() if not category or name in category}
        if unknown := [name for name in peer or [] if name not in who.PEERS]:
            raise UsageError(f"The peer {unknown[0]!r} is not known; use one of: {', '.join(who.PEERS)}.")
        opened = open_model(model, device="cpu", report=progress.report)
        opened.set_threads(threads)
        most, ends = opened.config.context, who.ends(opened)
        lengths = sorted(context or [length for length in work.CONTEXTS if length + new_tokens <= most])
        if lengths and max(lengths) + new_tokens > most:
            raise ContextError(f"{max(lengths):,} tokens and {new_tokens} more were asked for; the context of {model} "
                               f"is {most:,}.")  # fmt: skip
        asked = sampled(asked, sample) if sample else asked
        cases = work.chats(opened.vocabulary, asked, new_tokens, batch, ends)
        cases += work.contexts(opened.vocabulary, words, lengths, new_tokens, batch) if text is not None else []
        longest = new_tokens + max(len(prompt["tokens"]) for case in cases for prompt in case.prompts)
        default = ["none", "auto", *(["none/auto/bf16"] if opened.dtype != native_dtype(opened.device) else [])]
        contenders: list[Any] = [
            *who.ours(setting or default, model, draft_model, torch.get_num_threads()),
            *who.peers(
                peer or [name for name in who.PEERS if name != "assistant" or draft_model],
                opened.checkpoint,
                find(draft_model) if draft_model else None,
                llama_python or "",
                longest,
                torch.get_num_threads(),
            ),
        ]
        workers = {}
        for contender in work.opened(contenders, held, progress.report):
            if isinstance(contender, work.Worker):
                workers[contender.contender.name] = contender
                if note := contender.told.get("note"):
                    progress.say(f"{note} It is measured without that.")
            elif peer:
                raise contender
            else:
                progress.say(str(contender))
        if base is not None and base not in workers:
            raise UsageError(f"The base {base!r} isn't measured; use one of: {', '.join(workers)}.")
        against = base or ("transformers" if "transformers" in workers else next(iter(workers)))
        typer.echo(
            f"{'case':18} {'engine':24} {'tokens/s':>8} {'least':>8} {'most':>8}  ratio  first token s  peak MiB"
        )
        rows: list[dict[str, Any]] = []
        for results in work.measure(workers, cases, rounds, against, progress.report):
            progress.stop()
            rows += [_compared(result) for result in results]
        told = {name: worker.report() for name, worker in workers.items()}
    if plot is not None:
        draw_engines(rows, plot)
    _end(
        "engines on the same tokens, greedy, each in a process of its own, in turns",
        rows,
        output,
        model=model,
        rounds=rounds,
        max_new_tokens=new_tokens,
        base=against,
        engines=told,
    )


def _compared(result: Any) -> dict[str, Any]:
    """One engine on one case as a row, printed."""
    rate, ratio, first = result.tokens_per_second, result.ratio, result.first_token_seconds
    name = result.case if result.width == 1 else f"{result.case}, {result.width} at once"
    typer.echo(
        f"{name:18} {result.engine:24} {rate.median:8.1f} {rate.least:8.1f} {rate.most:8.1f}  {ratio.median:5.2f}"
        f"  {'' if first is None else format(first.median, '.3f'):>13}  {result.peak_bytes / 2**20:8,.0f}"
    )
    return asdict(result)


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


def _readable_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error.reason
        raise UsageError(f"{path} can't be read as text: {why}.") from error


def _end(what: str, rows: list[dict[str, Any]], output: Path | None, **more: Any) -> None:
    """The report, to a file and as the last line."""
    import torch

    from longspec.machine.system import cores, processor, total_bytes

    report = {
        "what": what,
        **more,
        "hardware": {
            "machine": platform.machine(),
            "processor": processor(),
            "cores": cores(),
            "memory_bytes": total_bytes(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"longspec": __version__, "torch": torch.__version__},
        "results": rows,
    }
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(report))
