"""`longspec bench`: benchmarks of this machine, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec.cli.commands.bench_drafters import SUITE, drafters
from longspec.cli.io.progress import Progress
from longspec.cli.options import parsers as readers
from longspec.cli.options.groups import Only, argument, expanded, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.reporting import Reporting
from longspec.cli.options.results import Results
from longspec.cli.options.typer_classes import Command, Group
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.bench.engines import EngineWorkload
    from longspec.model.load import Opened

__all__ = ["bench"]

bench = typer.Typer(cls=Group, add_completion=False, rich_markup_mode=None, help="Measure, and print a table.")


@group()
class CacheOptions:
    """Text, contexts and cache kinds."""

    text: Path = option(what="The text that is read and continued.", metavar="FILE")
    context: list[Any] | None = option(
        None, "Tokens of context, 256 or more; may be repeated.", metavar="N", parser=readers.whole(256), once=True
    )
    kind: list[str] | None = option(None, "A cache; may be repeated. All, if left out.", metavar="NAME")


@bench.command("cache", cls=Command)
@expanded
def cache(options: CacheOptions, loading: Annotated[Loading, Only("model", "dtype")], results: Results) -> None:
    """Compare the kinds of cache: bytes per token, perplexity, a needle test, tokens per second."""
    results.check(options.text, loading.model)
    from longspec.bench.cache import KINDS, CacheWorkload
    from longspec.engine.engine import Engine

    kinds = options.kind or KINDS
    _known("cache", kinds, KINDS)
    text = _readable_text(options.text)
    with Progress(loading.model) as progress:
        engine = Engine.load(loading.model, drafter="none", dtype=loading.dtype, report=progress.report)
        contexts = sorted(options.context or [512, 2048, engine.context])
        results.take(CacheWorkload(engine, text, contexts, kinds), progress)


bench.command("drafters", cls=Command)(drafters)


@group()
class BatchOptions:
    """Prompts, batch sizes and draft lengths."""

    suite: Path = option(what=SUITE, metavar="FILE")
    texts: list[Any] | None = option(
        None,
        "Texts side by side; may be repeated. 1, 2, 4, 8 and 16, if left out, as far as there are prompts.",
        metavar="N",
        parser=readers.whole(1, 256),
    )
    drafted: list[Any] | None = option(
        None,
        "Tokens that are always drafted; may be repeated. 1, 2, 4, 8 and 15, if left out; 0 is always there.",
        metavar="N",
        parser=readers.whole(0, 64),
    )
    drafter: str = option("auto", "auto, if left out.", metavar="NAME")
    prompts: int | None = option(None, "Of each category; else all.", metavar="N", parser=readers.whole(1))
    rounds: int = option(3, "Of everything.", metavar="N", parser=readers.whole(1))
    max_new_tokens: int = option(128, "Of each answer.", metavar="N", parser=readers.whole(1))


@bench.command("batch", cls=Command)
@expanded
def batch(options: BatchOptions, loading: Annotated[Loading, Only("model", "dtype")], results: Results) -> None:
    """Compare draft lengths by the number of texts side by side, and what the control makes of it."""
    results.check(options.suite, loading.model)
    from longspec.bench.batch import LENGTHS, TEXTS, BatchWorkload
    from longspec.bench.harness import read_suite, sample
    from longspec.engine.engine import Engine
    from longspec.model.load import open_model

    prompts = [prompt for some in sample(read_suite(options.suite), options.prompts).values() for prompt in some]
    texts = sorted(set(options.texts or [count for count in TEXTS if count <= len(prompts)]))
    if not prompts or texts[-1] > len(prompts):
        raise UsageError(f"{options.suite} has {len(prompts)} such prompts, and {texts[-1] if texts else 1} texts side "
                         "by side were asked for; give more prompts, or a smaller --texts.")  # fmt: skip
    with Progress(loading.model) as progress:
        opened = open_model(loading.model, dtype=loading.dtype, report=progress.report)
        opened.set_threads()
        model = opened.load(report=progress.report)
        fixed = {0: partial(Engine, model, drafter="none")}
        for length in set(options.drafted or LENGTHS) - {0}:
            fixed[length] = partial(Engine, model, drafter=options.drafter, control="fixed", draft_tokens=length)
        with TemporaryDirectory() as folder:
            auto = partial(Engine, model, drafter=options.drafter, costs_file=Path(folder, "costs.json"))
            results.take(BatchWorkload(fixed, auto, prompts, texts, options.max_new_tokens, options.rounds), progress)


@group()
class HeadOptions:
    """Heads, prompts and lengths."""

    heads: list[Path] | None = argument(
        None, "Folders of trained heads. Those that come along for the model, if left out.", metavar="DIR..."
    )
    suite: Path = option(what=SUITE, metavar="FILE")
    prompts: int | None = option(None, "Of each category; else all.", metavar="N", parser=readers.whole(1))
    rounds: int = option(3, "Of what is timed; 0: nothing is.", metavar="N", parser=readers.whole(0))
    max_new_tokens: int = option(128, "Of each answer.", metavar="N", parser=readers.whole(1))


@bench.command("heads", cls=Command)
@expanded
def heads(
    options: HeadOptions, loading: Annotated[Loading, Only("model", "dtype", "threads")], results: Results
) -> None:
    """Compare trained heads: size, accuracy by depth, tokens per step, and speed beside plain decoding."""
    results.check(options.suite, loading.model)
    from longspec.bench.harness import read_suite, sample
    from longspec.bench.heads import HeadWorkload
    from longspec.heads.format import shipped
    from longspec.model.load import CODED, native_dtype, open_model

    prompts = [prompt for some in sample(read_suite(options.suite), options.prompts).values() for prompt in some]
    if not prompts:
        raise UsageError(f"{options.suite} has no prompt; a suite has an object with `category` and `turns` a line.")
    with Progress(loading.model) as progress:
        opened = open_model(loading.model, dtype=loading.dtype, report=progress.report)
        opened.set_threads(loading.threads)
        dtypes = [opened.dtype]
        if loading.dtype == "auto" and opened.dtype in CODED:
            dtypes.insert(0, native_dtype(opened.device))
        models = {
            dtype: open_model(loading.model, dtype=dtype, report=progress.report).load(report=progress.report)
            for dtype in dtypes
        }
        folders = options.heads or list(shipped(models[dtypes[0]]).values())
        if not folders:
            raise UsageError(
                f"No head comes with longspec for {loading.model}; name folders that `longspec train` wrote."
            )
        workload = HeadWorkload(models, folders, prompts, options.max_new_tokens, options.rounds)
        results.take(workload, progress)


@group()
class EngineOptions:
    """Prompts, engines and rounds."""

    suite: Path | None = option(None, SUITE, metavar="FILE")
    category: list[str] | None = option(None, "Of the suite; may be repeated. All, else.", metavar="NAME")
    sample: int | None = option(None, "Of each category; else all.", metavar="N", parser=readers.whole(1))
    text: Path | None = option(None, "The text that is read and continued.", metavar="FILE")
    context: list[Any] | None = option(
        None,
        "Tokens of the text; may be repeated. 512, 2048 and 7000, if left out.",
        metavar="N",
        parser=readers.tokens,
        once=True,
    )
    setting: list[str] | None = option(
        None,
        "Of this engine, as drafter/cache/dtype; may be repeated. none, auto and none/auto/bf16, if left out.",
        metavar="NAME",
    )
    peer: list[str] | None = option(
        None,
        "transformers, lookup, assistant (both transformers too) or llama.cpp; may be repeated. What can be had, if "
        "left out.",
        metavar="NAME",
    )
    llama_python: str | None = option(None, "The interpreter that has llama-cpp-python.", metavar="PATH")
    base: str | None = option(None, "What ratios are to; transformers, if left out.", metavar="NAME")
    batch: int = option(8, "Texts side by side; 1 leaves them out.", metavar="N", parser=readers.whole(1))
    rounds: int = option(5, "Of everything.", metavar="N", parser=readers.whole(1))
    max_new_tokens: int = option(128, "Of each answer.", metavar="N", parser=readers.whole(2))


@bench.command("engines", cls=Command)
@expanded
def engines(
    options: EngineOptions,
    loading: Annotated[Loading, Only("model", "draft_model", "threads")],
    reporting: Annotated[Reporting, Only("quiet")],
    results: Results,
) -> None:
    """Compare this engine with transformers and llama.cpp on the CPU, each in a process of its own, in turns."""
    if options.suite is None and options.text is None:
        raise UsageError("There is nothing to write: give --suite for chats, --text for long contexts, or both.")
    results.check(options.suite, options.text, loading.model)
    with Progress(loading.model, quiet=reporting.quiet) as progress, ExitStack() as stack:
        progress.report("reading the prompts")
        from longspec.bench.contenders import PEERS
        from longspec.model.load import open_model

        _known("peer", options.peer or [], PEERS)
        opened = open_model(loading.model, device="cpu", report=progress.report)
        opened.set_threads(loading.threads)
        results.take(_engine_workload(options, loading, opened, stack, progress), progress)


def _engine_workload(
    options: EngineOptions, loading: Loading, opened: Opened, stack: ExitStack, progress: Progress
) -> EngineWorkload:
    """The benchmark's cases, and a process for each available engine; `stack` closes them."""
    import torch

    from longspec.bench import contenders as who
    from longspec.bench.engines import EngineWorkload, chats, contexts, lengths
    from longspec.bench.harness import read_suite, sample
    from longspec.bench.process import workers
    from longspec.model.files.hub import find
    from longspec.model.load import native_dtype

    suite = read_suite(options.suite) if options.suite is not None else {}
    if unknown := [name for name in options.category or [] if name not in suite]:
        raise UsageError(f"The suite has no category {unknown[0]!r}; it has: {', '.join(suite) or 'none'}.")
    suite = {name: prompts for name, prompts in suite.items() if not options.category or name in options.category}
    new, vocabulary, threads = options.max_new_tokens, opened.vocabulary, torch.get_num_threads()
    taken = lengths(options.context or [], new, opened.config.context, loading.model)
    cases = chats(vocabulary, sample(suite, options.sample), new, options.batch, who.ends(opened))
    if options.text is not None:
        cases += contexts(vocabulary, _readable_text(options.text), taken, new, options.batch)
    longest = new + max(len(prompt["tokens"]) for case in cases for prompt in case.prompts)
    settings = ["none", "auto", *(["none/auto/bf16"] if opened.dtype != native_dtype(opened.device) else [])]
    peers = options.peer or [name for name in who.PEERS if name != "assistant" or loading.draft_model]
    smaller = find(loading.draft_model) if loading.draft_model else None
    contenders = [
        *who.ours(options.setting or settings, loading.model, loading.draft_model, threads),
        *who.peers(peers, opened.checkpoint, smaller, options.llama_python or "", longest, threads),
    ]
    ready = workers(contenders, stack, progress.report, progress.say, needed=bool(options.peer))
    return EngineWorkload(ready, cases, options.rounds, options.base, loading.model)


def _known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"The {what} {unknown[0]!r} is not known; use one of: {', '.join(known)}.")


def _readable_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error.reason
        raise UsageError(f"{path} can't be read as text: {why}.") from error
