"""`longspec tune`: finds the fastest settings of a model on this machine, and the layers that `--drafter skip` leaves
out.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec.cli.io.distinct import refuse_same_files
from longspec.cli.io.progress import Progress
from longspec.cli.options import parsers as readers
from longspec.cli.options.groups import Only, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.reporting import Reporting
from longspec.errors import ContextError
from longspec.sampling.parameters import Bounds

if TYPE_CHECKING:
    from longspec.bench.fit import Measured
    from longspec.bench.harness import Table
    from longspec.bench.tune import Tuning
    from longspec.model.load import Model

__all__ = ["EPILOG", "tune"]

EPILOG = """\b
Examples:
  longspec tune --model smollm2
  longspec tune -m Qwen/Qwen3-8B --budget 600 --context 8k --output qwen3.json

\b
First, passes are timed in each dtype and with several numbers of threads; the
fastest setting whose perplexity is within 1 % of the best is what auto means
from then on, for every command (--dtype and --threads still go before it).
Then --drafter auto writes some texts and learns what steps cost, and limits of
--control entropy are fitted to what is kept. Last, the sub-layers that are left
out best are searched on texts that the model writes, and measured against
plain decoding, for --drafter skip. All is kept in the user's config and cache
directories; the tables go to stdout.
"""

_CONTEXT = 512
_BETS, _SETTINGS = 0.15, 0.2  # shares of the time budget at which measuring drafts, and fitting the bound, ends
_KEPT = ("dtype", "device", "context", "share", "agreement", "expected", "measured", "hardware", "versions")


@group("Search")
class Search:
    """The time budget, and the sequence length."""

    budget: float = option(
        120.0,
        "About how long it may take, without loading the model; 120 if left out.",
        metavar="SECONDS",
        parser=readers.number(Bounds(float, 0, open_below=True)),
    )
    context: int | None = option(
        None,
        "Tokens of the texts that it is tuned for; 8k is 8,192. 512 if left out.",
        short="-c",
        metavar="N",
        parser=readers.tokens,
        once=True,
    )
    output: Path | None = option(
        None,
        "Keep the set in FILE, not where --drafter skip finds it, and nothing else.",
        metavar="FILE",
        panel="Output",
        once=True,
    )


def tune(
    loading: Annotated[Loading, Only("model", "device", "dtype", "threads")],
    search: Search,
    reporting: Annotated[Reporting, Only("as_json", "quiet")],
) -> None:
    """Find how a model is best run on this machine: dtype, threads, drafting, and what --drafter skip leaves out."""
    model = loading.model
    refuse_same_files({"the set": search.output}, [model])
    with Progress(model, quiet=reporting.quiet) as progress:
        progress.report(f"loading {model}")
        from longspec.bench import fit as fits
        from longspec.bench import gate as gates
        from longspec.bench import tune as work
        from longspec.drafters.layer_skip import save_skip, saved_path
        from longspec.machine.tuned import fit_path, keep_fit
        from longspec.model.load import open_model

        work.load_optuna()
        began = perf_counter()
        opened = open_model(model, dtype=loading.dtype, device=loading.device, report=progress.report)
        most = opened.config.context
        if search.context is not None and search.context > most:
            raise ContextError(f"{search.context:,} tokens were asked for; the context of {model} is {most:,}.")
        tokens = min(_CONTEXT, most) if search.context is None else search.context
        opened.set_threads(loading.threads)
        settings, loaded = fits.measure(
            opened,
            fits.candidates(opened) if loading.dtype == "auto" else [opened.dtype],
            fits.threads_of(opened.device) if loading.threads is None else [loading.threads],
            progress.report,
        )
        faster = fits.bets(loaded, tokens, began + _BETS * search.budget, progress.report)
        gate = gates.calibrate(loaded, began + _SETTINGS * search.budget, progress.report)
        tuning = work.tune(loaded, context=tokens, seconds=(1 - _SETTINGS) * search.budget, report=progress.report)
    report, path = _report(loaded, tuning, tokens), saved_path(loaded) if search.output is None else search.output
    report |= {"auto": round(faster, 4), "settings": [_setting(one) for one in settings]}
    report["gate"] = {"limits": gate.limits, "saved": round(gate.saved, 4), "lost": round(gate.lost, 4)}
    if reporting.as_json:
        typer.echo(json.dumps({**report, "file": str(path)}, ensure_ascii=False))
    else:
        _print(report)
    kept = [path]
    save_skip(path, tuning.sets[0].skip, loaded, {name: report[name] for name in _KEPT})
    if search.output is None:
        kept.append(fit_path(opened.config, str(opened.device), coded=opened.checkpoint.coded))
        fit = replace(fits.best(settings).fit, entropy=gate.limits)
        keep_fit(kept[1], fit, {name: report[name] for name in ("model", "settings", "versions")})
    if not reporting.as_json:
        typer.echo(f"Kept in {' and '.join(map(str, kept))}")


def _report(model: Model, tuning: Tuning, context: int) -> dict[str, Any]:
    """The object that `--json` prints: the best set first, then all sets measured."""
    import torch

    from longspec import __version__

    sets = [
        {
            "attention": sorted(one.skip.attention),
            "mlp": sorted(one.skip.mlp),
            "share": round(one.share, 4),
            "agreement": round(one.agreement, 4),
            "expected": round(one.expected, 4),
            "measured": None if one.measured is None else round(one.measured, 4),
        }
        for one in tuning.sets
    ]
    return {
        "model": model.name,
        "dtype": model.dtype,
        "device": str(model.decoder.device),
        "threads": torch.get_num_threads(),
        "context": context,
        **sets[0],
        "faster": (tuning.sets[0].measured or 0.0) > 1,
        "tokens_per_second": round(tuning.tokens_per_second, 2),
        "tried": tuning.tried,
        "row": round(tuning.prices.row, 4),
        "milliseconds": {
            name: [round(1000 * seconds, 3) for seconds in getattr(tuning.prices, name)]
            for name in ("whole", "attention", "mlp")
        }
        | {"rest": round(1000 * tuning.prices.rest, 3)},
        "sets": sets,
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"longspec": __version__, "torch": torch.__version__},
    }


def _setting(one: Measured) -> dict[str, Any]:
    return {
        "dtype": one.fit.dtype,
        "threads": one.fit.threads,
        "milliseconds": [round(1000 * seconds, 3) for seconds in one.seconds],  # of passes over 1, 9 and 64 tokens
        "perplexity": round(one.perplexity, 4),
    }


def _print(report: dict[str, Any]) -> None:
    from longspec.bench.harness import Column, Table

    def milliseconds(place: int) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row['milliseconds'][place]:.2f} ms"

    _echo(
        Table(
            Column("DTYPE", -5, "{dtype}"),
            Column("THREADS", 7, "{threads}"),
            Column("1 TOKEN", 10, milliseconds(0)),
            Column("9 TOKENS", 10, milliseconds(1)),
            Column("64 TOKENS", 10, milliseconds(2)),
            Column("PERPLEXITY", 10, "{perplexity:.3f}"),
        ),
        report["settings"],
    )
    typer.echo(
        f"The fastest is {report['dtype']} with {report['threads']} thread{'s' * (report['threads'] > 1)}; there "
        f"--drafter auto writes {report['auto']:.2f} times the tokens/s of plain decoding."
    )
    gate = report["gate"]
    typer.echo(
        f"--control entropy drafts {_limits(gate['limits'])}: {100 * gate['saved']:.0f} % fewer drafted tokens, "
        f"{100 * gate['lost']:.0f} % fewer tokens a step.\n"
    )
    typer.echo(
        f"{report['model']} in {report['dtype']} on {report['device']}, {report['context']:,} tokens of context: "
        f"{report['tokens_per_second']:.1f} tokens/s without drafts, {report['tried']} sets tried"
    )
    _echo(
        Table(
            Column("ATTENTIONS", 10, lambda row: str(len(row["attention"]))),
            Column("MLPS", 4, lambda row: str(len(row["mlp"]))),
            Column("PASS", 4, "{share:.2f}"),
            Column("AGREEMENT", 9, "{agreement:.2f}"),
            Column("EXPECTED", 8, "{expected:.2f}"),
            Column("MEASURED", 8, "{measured:.2f}"),
        ),
        report["sets"],
    )
    if report["faster"]:
        typer.echo(f"The first writes {report['measured']:.2f} times the tokens/s of plain decoding.")
    else:
        typer.echo("None is faster than plain decoding here: --drafter skip is not worth its while for this model.")


def _limits(pairs: Sequence[tuple[float, int]]) -> str:
    return ", ".join([*(f"{tokens} tokens behind {nats:.2f} nats" for nats, tokens in pairs[:-1]),
                      f"{pairs[-1][1]} behind more"])  # fmt: skip


def _echo(table: Table, rows: list[dict[str, Any]]) -> None:
    typer.echo("\n".join([table.head, *map(table.line, rows)]))
