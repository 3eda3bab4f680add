"""`longspec plan`: the memory that each kind of cache needs for a sequence length, and whether this machine has it.

Reads a model's headers, or its config.json alone where it isn't on this machine; no weight is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec.cli.io.batch_forecast import Many, Measured, forecast, print_forecast
from longspec.cli.io.progress import Progress
from longspec.cli.options import parsers as readers
from longspec.cli.options.groups import Only, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.reporting import Reporting
from longspec.errors import ContextError, ModelError

if TYPE_CHECKING:
    from longspec.memory.plan import Choice, Request

__all__ = ["EPILOG", "plan"]

EPILOG = """\b
Examples:
  longspec plan --model smollm2 --context 4000
  longspec plan -m Qwen/Qwen3-8B --context 32k --memory 12GiB
  longspec plan --texts 1e7 --nodes 8 --measured run.json --lengths answers.jsonl

\b
The table goes to stdout. The exit code is 0, also where nothing fits: it is an answer.
"""

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
        request, stored = _request(loading.model, place.device, place.dtype, context)
        report = {"model": loading.model, "format": stored, **_report(request, planned.memory or "auto")}
        if measured is not None:
            progress.report("simulating the batch")
            report["batch"] = forecast(many, measured, _memory(request, measured.width))
    if reporting.as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)
        if measured is not None:
            print_forecast(report["batch"])


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
    from longspec.model.weights.footprint import Footprint, parameters

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
        footprint = Footprint(weights, weights, weights)
        request = Request(config, kind, place, footprint, min(context or config.context, config.context), process)
    if context is not None and context > request.config.context:
        raise ContextError(f"{context:,} tokens were asked for; the context of {model} is {request.config.context:,}.")
    return request, stored


def _report(request: Request, memory: str | int) -> dict[str, Any]:
    """The object that `--json` prints."""
    import torch

    from longspec.cache import CACHES, LOSSLESS
    from longspec.memory.plan import CHUNKS, alone, budget_of, choice, choices, filled
    from longspec.model.weights.footprint import parameters

    budget = budget_of(request, memory)
    caches = []
    for name in CACHES:
        tried = [choice(request, name, rows) for rows in CHUNKS]
        fitting = next((one for one in tried if one.lacks(budget) is None), None)
        shown = fitting or tried[-1]
        room = CACHES[name](replace(request.shape, device=torch.device("meta"))).room(request.tokens)
        caches.append(
            {
                "cache": name,
                "cache_lossless": name in LOSSLESS,
                "bytes_per_token": room.device / request.tokens,
                "cache_bytes": room.device,
                "host_bytes": room.host,
                "disk_bytes": room.disk,
                "total_bytes": shown.need.total,
                "prefill_rows": shown.prefill_rows,
                "fits": fitting is not None,
                "lacks": shown.lacks(budget),
            }
        )
    picked = next((filled(request, one, budget) for one in choices(request) if one.lacks(budget) is None), None)
    return {
        "dtype": request.dtype,
        "device": str(request.device),
        "context": request.tokens,
        "budget_bytes": budget,
        "process_bytes": request.process,
        "weights_bytes": request.footprint.weights,
        "weights_bits": round(8 * request.footprint.weights / parameters(request.config, tied=request.config.tied), 2),
        "least_bytes": alone(request),
        "picked": picked and _picked(picked),
        "from_disk": picked and _from_disk(request, picked),
        "curve": [{"budget_bytes": one.need.total, **_picked(one)} for one in _curve(choices(request))],
        "caches": caches,
    }


def _picked(one: Choice) -> dict[str, Any]:
    said = {name: getattr(one, name) for name in ("cache", "prefill_rows", "draft_tokens")}
    return {**said, "weights": "memory" if one.kept is None else "disk"}


def _from_disk(request: Request, picked: Choice) -> dict[str, Any] | None:
    """What a plain token reads of weights on disk, and how long that takes; None where all are in memory."""
    if picked.kept is None:
        return None
    from longspec.machine.disk import read_rate

    file = None if request.checkpoint is None else request.checkpoint.largest
    rate = None if file is None else read_rate(file)
    return {
        "kept_layers": picked.kept,
        "layers": len(request.footprint.layers),
        "bytes_per_token": picked.streamed,
        "disk_bytes_per_second": rate,
        "tokens_per_second": rate and picked.streamed and rate / picked.streamed,
    }


def _curve(choices: Iterable[Choice]) -> Iterator[Choice]:
    """What is taken as the budget falls: each choice, tried in this order, that needs less than all before it."""
    least = math.inf
    for one in choices:
        if one.need.total < least:
            least = one.need.total
            yield one


def _print(report: dict[str, Any]) -> None:
    from longspec.machine.system import shown

    typer.echo(
        f"{report['model']} in {report['dtype']} on {report['device']}: {report['context']:,} tokens in "
        f"{shown(report['budget_bytes'])}, of which weights {shown(report['weights_bytes'])} "
        f"({report['weights_bits']:.1f} bits a weight{'; the file: ' + report['format'] if report['format'] else ''})"
    )
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
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for name, *numbers, fits in rows:
        cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:4], strict=True)]
        typer.echo(f"{name:{widths[0]}}  {'  '.join(cells)}  {fits}")
    picked = report["picked"]
    if picked:
        sentence = f"takes {picked['cache']}"
    elif report["least_bytes"] > report["budget_bytes"]:
        sentence = f"finds nothing that fits: process and weights alone need {shown(report['least_bytes'])}"
    else:
        sentence = "finds nothing that fits"
    typer.echo(f"* the text may differ from dense's. --cache auto {sentence}.")
    if picked:
        _print_disk(report["from_disk"])
        _print_curve(report["curve"])


def _print_disk(said: dict[str, Any] | None) -> None:
    from longspec.machine.system import shown

    if said is None:
        return
    speed = ""
    if said["tokens_per_second"]:
        read = f"{said['disk_bytes_per_second'] / 1e6:,.0f} MB/s"
        speed = f": at {read}, as it was read now, {said['tokens_per_second']:.2g} tokens/s without drafts"
    typer.echo(
        f"The weights of {said['layers'] - said['kept_layers']} of {said['layers']} layers stay on disk, "
        f"{shown(said['bytes_per_token'])} for each pass{speed}."
    )


def _print_curve(curve: Sequence[dict[str, Any]]) -> None:
    from longspec.machine.system import shown

    typer.echo("\nWhat --memory makes of a budget, at least:")
    typer.echo(f"{'BUDGET':>10}  {'CACHE':5}  DRAFTED  PREFILL  WEIGHTS")
    for one in curve:
        budget, cache = shown(one["budget_bytes"]), one["cache"]
        typer.echo(f"{budget:>10}  {cache:5}  {one['draft_tokens']:7}  {one['prefill_rows']:7}  {one['weights']}")
