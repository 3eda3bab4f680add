"""`longspec export`: writes a trained head in the layout of another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspec.cli.io.progress import Progress
from longspec.cli.options.groups import Only, argument, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.reporting import Reporting
from longspec.errors import UsageError

__all__ = ["EPILOG", "export"]

EPILOG = """\b
Examples:
  longspec export ./head --to speculators -m smollm2 -o out
  longspec export ./head --to gguf -m smollm2 -o draft.gguf

\b
speculators is a folder that vLLM serves; gguf a draft file for llama.cpp. There
are layouts for the kinds eagle3 and fastmtp; what has none is refused. A head
is bound to its model, which is loaded for the rows of its output matrix.
"""

LAYOUTS = ("speculators", "gguf", "vllm")


@group("Export")
class Export:
    """What is written, and where."""

    head: Path = argument(what="The head's folder, which `longspec train` wrote.", metavar="HEAD")
    to: str = option(what=f"The layout: {', '.join(LAYOUTS)}.", metavar="LAYOUT", once=True)
    output: Path = option(what="The folder, or the GGUF file.", short="-o", metavar="PATH", once=True)
    verifier: str | None = option(
        None,
        "What the layout calls the model, a Hugging Face id or a folder; its own name if left out.",
        metavar="NAME",
        once=True,
    )


def export(
    what: Export,
    loading: Annotated[Loading, Only("model", "dtype")],
    reporting: Annotated[Reporting, Only("quiet")],
) -> None:
    """Write a trained head for vLLM or llama.cpp."""
    if what.to not in LAYOUTS:
        raise UsageError(f"There is no layout {what.to!r}; use one of: {', '.join(LAYOUTS)}.")
    if not (what.head / "config.json").is_file():
        raise UsageError(f"{what.head} holds no head; name the folder that `longspec train` wrote.")
    with Progress(loading.model, quiet=reporting.quiet) as progress:
        progress.report(f"loading {loading.model}")
        from longspec.heads.format import load_head, read_about
        from longspec.heads.published.draft_gguf import write_gguf
        from longspec.heads.published.speculators import write_speculators
        from longspec.model.load import CODED, open_model

        kind, dtype = read_about(what.head)["kind"], "bf16" if loading.dtype == "auto" else loading.dtype
        if what.to == "vllm":
            raise UsageError(_no_proposer(kind))
        if dtype in CODED:
            raise UsageError("A head is exported in bf16 or fp32: take --dtype bf16.")
        model = open_model(loading.model, dtype=dtype, device="cpu", report=progress.report).load()
        head = load_head(what.head, model)
        if what.to == "gguf":
            write_gguf(what.output, head, model)
        else:
            write_speculators(what.output, head, model, what.verifier or loading.model)
    typer.echo(f"Kept in {what.output}")


def _no_proposer(kind: str) -> str:
    from longspec.heads.published.speculators import TYPES

    if kind in TYPES:
        return f"vLLM serves a head of the kind {kind} from the layout of speculators: take --to speculators."
    return (f"vLLM can't draft with a head of the kind {kind}: it gives a proposer of one's own (custom_class) the "
            f"tokens and no hidden states, which the head reads; train {' or '.join(TYPES)} instead.")  # fmt: skip
