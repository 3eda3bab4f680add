"""`longspec plan`: the memory that each kind of cache needs for a sequence length, and whether this machine has it.

Reads a model's headers, or its config.json alone where it isn't on this machine; no weight is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec.cli.io.batch_forecast import Many, Measured, forecast, print_forecast
from longspec.cli.io.progress import Progress, folded, table
from longspec.cli.options import parsers as readers
from longspec.cli.options.groups import Only, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.reporting import Reporting
from longspec.errors import ContextError, ModelError

if TYPE_CHECKING:
    from longspec.memory.plan import Request

__all__ = ["EPILOG", "plan"]

EPILOG = """\b
Examples:
  longspec plan --model smollm2 --context 4000
  longspec plan -m Qwen/Qwen3-8B --context 32k --memory 12GiB
  longspec plan --texts 1e7 --nodes 8 --measured run.json --lengths answers.jsonl

\b
The table goes to stdout. Where nothing fits, the exit code is 4.
"""

_STDOUT = 1

_BITS = {"int8": 8.5, "int4": 4.5}
"""Bits of a coded weight."""

_TOKENIZER_NBYTES = 700
"""Per token of the vocabulary: what its tokenizer takes in memory (49,152 tokens: 33 MB)."""


@group("Model and method")
class Planned:
    """The sequence length, and the memory budget."""

    context: int | None = option(
        None,
        "Tokens of prompt and answer; 32k is 32,768. The model's whole context if left out.",
        short="-c",
        metavar="N",
        parser=readers.tokens,
        once=True,
    )
    memory: str | None = option(
        None,
        "What has to hold it, such as 6GiB: on a CPU all that the process takes, on a GPU what is reserved "
        "there. What is free, if left out.",
        metavar="SIZE",
        parser=readers.size,
    )


def plan(
    loading: Annotated[Loading, Only("model")],
    planned: Planned,
    place: Annotated[Loading, Only("device", "dtype", "threads")],
    many: Many,
    reporting: Annotated[Reporting, Only("as_json")],
) -> None:
    """Show what each kind of cache takes for a text, and which fit, without loading the model."""
    many.check()
    with Progress(loading.model) as progress:
        progress.report(f"reading {loading.model}")
        import torch

        if place.threads is not None:
            torch.set_num_threads(place.threads)
        measured = None if many.texts is None else Measured.read(many)
        context = planned.context or (None if measured is None else measured.longest)
        from longspec.memory.report import report as report_of

        request, stored = _request(loading.model, place.device, place.dtype, context)
        report = {
            "model": loading.model,
            "format": stored,
            **report_of(request, planned.memory or "auto", _measured(request)),
        }
        if measured is not None:
            progress.report("simulating the batch")
            report["batch"] = forecast(many, measured, _memory(request, measured.width))
    if reporting.as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)
        if measured is not None:
            print_forecast(report["batch"])
    if report["picked"] is None:
        from longspec.memory.plan import plan as planned_for

        planned_for(request, report["budget_bytes"])  # raises what a run would


def _memory(request: Request, texts: int) -> int:
    """Bytes of an engine with so many texts side by side, with the cache that is taken while memory lasts."""
    from longspec.memory.plan import CHUNKS, choice

    return choice(replace(request, texts=texts), "dense", CHUNKS[0]).need.total


def _request(model: str, device: str, dtype: str, context: int | None) -> tuple[Request, str | None]:
    """What is planned for, and what the files hold weights as; None where they aren't here."""
    import longspec.engine.engine  # noqa: F401 - counts in the process's memory, as in a run
    from longspec.machine.system import resident_bytes
    from longspec.memory.plan import Request, request_of
    from longspec.model.config import Config
    from longspec.model.files.checkpoint import Checkpoint
    from longspec.model.files.hub import fetch_config
    from longspec.model.load import DTYPES, choose_device, choose_dtype, open_model
    from longspec.model.weights.footprint import Footprint, estimated, parameters

    place = choose_device(device)
    try:
        opened = open_model(model, dtype=dtype, device=device, offline=True)
        request, stored = request_of(opened, context), opened.checkpoint.format
    except ModelError:
        raw = fetch_config(model)
        if raw is None:
            raise
        config = Config.read(raw)
        checkpoint = Checkpoint(model)
        kind = choose_dtype(dtype, place, checkpoint, config)
        tied = bool(raw.get("tie_word_embeddings", config.family.startswith("gemma")))
        weights = int(parameters(config, tied=tied) * _BITS.get(kind, 8 * DTYPES[kind].itemsize) / 8)
        stored = None
        process = resident_bytes() + _TOKENIZER_NBYTES * config.vocabulary
        footprint = Footprint(weights, weights, weights, passes=estimated(config, weights, tied=tied))
        request = Request(config, kind, place, footprint, min(context or config.context, config.context), process)
    if context is not None and context > request.config.context:
        raise ContextError(f"{context:,} tokens were asked for; the context of {model} is {request.config.context:,}.")
    return request, stored


def _measured(request: Request) -> Callable[[float], float] | None:
    """Seconds of a pass by its rows, as earlier runs of the model on this machine found them; None without any."""
    import torch

    from longspec.control.latency import Curve, costs_file, read

    threads, reads = torch.get_num_threads(), request.footprint.reads
    path = costs_file(request.config, request.dtype, request.device, threads, strict=request.strict, streamed=None)
    curve = Curve.of((read(path) or {}).get("passes"))
    curve.growth = lambda rows: reads.by_rows(rows) / reads.by_rows(1)
    return curve.seconds if curve.report() else None


def _print(report: dict[str, Any]) -> None:
    from longspec.machine.system import shown

    bits = f"{report['weights_bits']:.1f} bits a weight"
    stored = f"; the file: {report['format'].removesuffix(f', {bits}')}" if report["format"] else ""
    head = (
        f"{report['model']} in {report['dtype']} on {report['device']} ({bits}{stored}): "
        f"{report['context']:,} tokens in {shown(report['budget_bytes'])}"
    )
    typer.echo(folded(head, _STDOUT))
    rows = [("CACHE", "BYTES/TOKEN", "BYTES", "TOTAL", "FITS")]
    for one in report["caches"]:
        below = "".join(
            f" + {shown(one[f'{place}_bytes'])} {word}"
            for place, word in (("host", "host"), ("disk", "disk"))
            if one[f"{place}_bytes"]
        )
        fits = "yes" if one["fits"] else f"no: {one['lacks']}"
        if one["fits"] and one["prefill_rows"] != max(other["prefill_rows"] for other in report["caches"]):
            fits += f", with prefill chunks of {one['prefill_rows']} tokens"
        mark = "" if one["cache_lossless"] else " *"
        per_token, cache_bytes = f"{one['bytes_per_token']:,.0f}", shown(one["cache_bytes"]) + below
        rows.append((one["cache"] + mark, per_token, cache_bytes, shown(one["total_bytes"]), fits))
    typer.echo(table(rows, right=(1, 2, 3)))
    picked = report["picked"]
    typer.echo("* the text may differ from dense's")
    sentence = f"takes {picked['cache']}" if picked else "finds nothing that fits; the least that there is"
    typer.echo("\n" + folded(f"--cache auto {sentence}: {_sum(report['parts'])}.", _STDOUT))
    if picked:
        _print_reads(report["reads"], report["context"])
        _print_disk(report["from_disk"])
        _print_curve(report)


def _sum(parts: Mapping[str, int]) -> str:
    """The parts, rounded so that they make the total that is shown."""
    total = sum(parts.values())
    unit, word = (1 << 20, "MiB") if total < 10 << 30 else ((1 << 30) / 10, "GiB")
    ends = [ceil(end / unit) for end in accumulate(parts.values(), initial=0)]
    counts = [*(end - start for start, end in pairwise(ends)), ends[-1]]
    *each, whole = [f"{count:,}" if word == "MiB" else f"{count / 10:,.1f}" for count in counts]
    said = " + ".join(f"{name} {count}" for name, count, number in zip(parts, each, counts, strict=False) if number)
    return f"{said} = {whole} {word}"


def _print_reads(said: dict[str, Any], context: int) -> None:
    from longspec.machine.system import shown

    rate = ""
    if said["tokens_per_second"]:
        read = f"{said['memory_bytes_per_second'] / 1e9:,.1f} GB/s"
        rate = f", {said['tokens_per_second']:.3g} tokens/s without drafts by the {read} that memory is read at here"
    if said["measured_tokens_per_second"]:
        rate += f" ({said['measured_tokens_per_second']:.3g} in earlier runs)"
    reads = (
        f"A token behind {context:,} others reads {shown(said['bytes_per_token'])}, {shown(said['weights_bytes'])} of "
        f"weights and {shown(said['cache_bytes'])} of cache{rate}."
    )
    typer.echo(folded(reads, _STDOUT))
    if said["union"]:
        each = [f"{one['rows']}: {one['experts']:.0f} ({shown(one['bytes'])})" for one in said["union"]]
        union = (
            f"Rows of a pass, and the experts of {said['experts']} that they read if they choose at random: "
            f"{', '.join(each)}. Rows of one text choose more alike."
        )
        typer.echo(folded(union, _STDOUT))


def _print_disk(said: dict[str, Any] | None) -> None:
    from longspec.machine.system import shown

    if said is None:
        return
    speed = ""
    if said["tokens_per_second"]:
        read = f"{said['disk_bytes_per_second'] / 1e6:,.0f} MB/s"
        speed = f": at {read}, as it was read now, {said['tokens_per_second']:.2g} tokens/s without drafts"
    stay = (
        f"The weights of {said['layers'] - said['kept_layers']} of {said['layers']} layers stay on disk, "
        f"{shown(said['bytes_per_token'])} for each pass{speed}."
    )
    typer.echo(folded(stay, _STDOUT))


def _print_curve(report: dict[str, Any]) -> None:
    from longspec.machine.system import shown

    what = "What is taken as the budget falls, with the least that it needs and the tokens/s to expect of it:"
    typer.echo("\n" + folded(what, _STDOUT))
    taken = next((one for one in report["curve"] if one["budget_bytes"] <= report["budget_bytes"]), None)
    rows = [("BUDGET", "CACHE", "DRAFTED", "PREFILL", "WEIGHTS", "TOKENS/S", "DRAFTERS")]
    for one in report["curve"]:
        rate = f"{one['tokens_per_second']:.3g}" if one["tokens_per_second"] else "unknown"
        numbers = (str(one["draft_tokens"]), str(one["prefill_rows"]))
        drafters = ", ".join(one["drafters"] or ["auto"]) if one["draft_tokens"] else "none"
        drafters += " (taken)" if one is taken else ""
        rows.append((shown(one["budget_bytes"]), one["cache"], *numbers, one["weights"], rate, drafters))
    typer.echo(table(rows, right=(0, 2, 3, 5)))
    typer.echo(folded(_why(report), _STDOUT))


def _why(report: dict[str, Any]) -> str:
    """What more memory would bring."""
    from longspec.machine.system import shown

    picked, further = report["picked"], report["next"]
    if further is None:
        return "More memory would bring nothing more."
    said_of = {
        "weights": "weights in {}",
        "cache": "cache {}",
        "draft_tokens": "{} drafted tokens",
        "prefill_rows": "prefill chunks of {} rows",
    }
    changes = [word.format(further[key]) for key, word in said_of.items() if further[key] != picked[key]]
    more = shown(further["budget_bytes"] - report["budget_bytes"])
    return f"With {more} more the row above would be taken: {', '.join(changes) or 'other drafters'}."
