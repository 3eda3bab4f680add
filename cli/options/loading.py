"""The options of loading a model and of drafting. Names of drafters, caches and devices are checked by the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from longspec.cli.options.conflicts import settle_loading
from longspec.cli.options.groups import group, option, values
from longspec.cli.options.parsers import size, whole

__all__ = ["CACHES", "CONTROLS", "DRAFTERS", "DTYPES", "WEIGHTS", "Loading", "among"]

DRAFTERS = (
    "auto",
    "none",
    "ngram",
    "lookahead",
    "suffix",
    "recycle",
    "skip",
    "exit",
    "pipeline",
    "sparse",
    "model",
    "mtp",
    "recycle+ngram",
)
CACHES = ("auto", "dense", "int8", "int4", "int2", "dual", "offload", "disk")
CONTROLS = ("goodput", "fixed", "entropy")
DTYPES = ("auto", "fp32", "bf16", "int8", "int4")
WEIGHTS = ("auto", "memory", "disk")
"""What a shell offers for these flags. The engine knows them and is too slow to be asked: a test holds it to them."""


def among(*names: str) -> Callable[[str], list[str]]:
    """A shell's completions out of these names."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Completions of a model's name: those that are here, and the catalogue's."""
    from longspec.model.files.catalogue import catalogue
    from longspec.model.files.hub import installed

    return [name for name in [*(one.name for one in installed()), *catalogue()] if name.startswith(incomplete)]


@group("Model and method")
class Loading:
    """The options of an engine; the fields' names are those of `Engine.load`."""

    model: str = option(
        "smollm2",
        "A short name (longspec models), a folder, a .gguf file, or a Hugging Face id: owner/name, or "
        "owner/name:file.gguf. smollm2 if left out.",
        short="-m",
        metavar="MODEL",
        autocompletion=models,
    )
    drafter: str = option(
        "auto",
        "What drafts the next tokens: auto, one by name, one over another (model+ngram), or the folder of a "
        "trained head. none is plain decoding; the text is the same.",
        metavar="NAME",
        autocompletion=among(*DRAFTERS),
    )
    draft_model: str | None = option(
        None,
        "The smaller model that the drafter `model` drafts with, named as --model is.",
        metavar="MODEL",
        autocompletion=models,
    )
    num_speculative_tokens: int | None = option(
        None,
        "The most tokens that are drafted in a step: 1 to 64, 15 if left out. (48 with weights on disk.)",
        metavar="N",
        parser=whole(1, 64),
    )
    control: str = option(
        "goodput",
        "How many tokens are drafted: goodput (as many as bring the most tokens per second, none where drafting would "
        "lose), fixed (always the most), or entropy (fewer after a token that was hard to foresee).",
        metavar="NAME",
        autocompletion=among(*CONTROLS),
    )
    accept: str = option(
        "exact",
        "How drafts are accepted: exact, or semantic:FOLDER, which is LOSSY: steps of reasoning that --draft-model "
        "writes stay where a trained probe takes them to mean what the model would write, so that the text is another.",
        metavar="HOW",
        once=True,
        autocompletion=among("exact", "semantic:"),
    )
    skip_set: str | None = option(
        None,
        "What the drafter `skip` leaves out: a file that `longspec tune` wrote. Else what it saved for the model, "
        "and a search on the text.",
        metavar="FILE",
    )
    draft_from: list[str] | None = option(
        None, "A text that the answer may repeat in parts, to draft from. May be repeated.", metavar="FILE"
    )
    remember: bool = option(
        False,
        "Draft from earlier answers too, and keep this one in the cache folder; longspec forget deletes them.",
    )
    cache: str = option(
        "auto",
        "How keys and values are kept: auto, or one by name. auto is dense, or with --memory what fits.",
        metavar="NAME",
        autocompletion=among(*CACHES),
    )
    device: str = option(
        "auto",
        "auto, cpu, cuda or cuda:N. auto is the GPU where there is one.",
        metavar="NAME",
        autocompletion=among("auto", "cpu", "cuda"),
    )
    dtype: str = option(
        "auto",
        "auto, fp32, bf16, int8 or int4: quantized weights, as a file of codes has them, else of so many bits, with "
        "nearly the same text. auto is int8 where a file holds codes, else bf16, as far as the processor has them.",
        metavar="NAME",
        autocompletion=among(*DTYPES),
    )
    threads: int | None = option(
        None, "Threads on a CPU; torch chooses if this is left out.", metavar="N", parser=whole(1, 1024)
    )
    all_rows: bool = option(
        False,
        "With the caches offload and disk: read keys and values of every token position exactly, as dense does. "
        "Slower.",
    )
    memory: str | None = option(
        None,
        "What the process may have, such as 6GiB (on a GPU: what is reserved there), or auto for what is free. "
        "The cache is chosen to fit, unless it is named; what can't fit is refused at once.",
        metavar="SIZE",
        parser=size,
    )
    weights: str = option(
        "auto",
        "Where the layers' weights are: memory, disk (each pass reads them; --memory keeps as many as it holds), or "
        "auto: on disk where --memory can't hold them. The text is the same.",
        metavar="NAME",
        autocompletion=among(*WEIGHTS),
    )
    strict: bool = option(
        False,
        "Make a token's bits independent of the tokens beside it in a pass (batch invariance), as the C kernels do, "
        "where there are none: on a GPU, in fp32, without a C compiler. Slower.",
    )

    def engine_options(self, ctx: typer.Context) -> dict[str, Any]:
        """The keywords of `Engine.load` except the model, with conflicts resolved."""
        options = values(self)
        del options["model"]
        options["draft_from"] = self.draft_from or ()
        settle_loading(ctx, options)
        return options
