"""`longspec bench drafters`: drafters against plain decoding, by first turns or in the way of Spec-Bench's scripts."""

from __future__ import annotations

from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from longspec.cli.io.progress import Progress
from longspec.cli.options import parsers as readers
from longspec.cli.options.groups import Only, expanded, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.results import Results
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.bench.harness import Workload
    from longspec.bench.process import Worker
    from longspec.engine.engine import Engine
    from longspec.model.load import Opened

__all__ = ["SUITE", "drafters"]

SUITE = "Prompts: objects with `category` and `turns`, one a line."

_NEW_TOKENS = 128


@group()
class DrafterOptions:
    """Prompts, lengths and drafters."""

    suite: Path = option(what=SUITE, metavar="FILE")
    drafter: list[str] | None = option(
        None, "May be repeated. auto, if left out; with --official ngram and recycle+ngram too.", metavar="NAME"
    )
    prompts: int | None = option(
        None, "Of each category, or with --official of each task; else all.", metavar="N", parser=readers.whole(1)
    )
    max_new_tokens: int | None = option(
        None, "Of each answer. 128, if left out, or 1,024 with --official.", metavar="N", parser=readers.whole(1)
    )
    transformers: bool = option(
        False, "Beside them, transformers' generate with its prompt lookup.", flag="--transformers"
    )
    official: bool = option(
        False,
        "As Spec-Bench's scripts do it: all turns, its six tasks, mean accepted tokens and speed-up by their formulas.",
        flag="--official",
    )
    answers: Path | None = option(
        None,
        "With --official, keep the answers, and begin with those that are there: a run that ended goes on.",
        metavar="FILE",
        once=True,
    )


@group("Model and method")
class CacheKind:
    """The cache kind, the same for all drafters."""

    cache: str = option("dense", "A kind of cache; dense, if left out.", metavar="NAME")


@expanded
def drafters(
    options: DrafterOptions,
    loading: Annotated[Loading, Only("model", "draft_model", "dtype")],
    kind: CacheKind,
    drafting: Annotated[Loading, Only("num_speculative_tokens", "control")],
    results: Results,
) -> None:
    """Compare drafters with plain decoding, prompt by prompt in turns, by category."""
    results.check(options.suite, loading.model, loading.draft_model, options.answers)
    if options.answers is not None and not options.official:
        raise UsageError("--answers keeps the answers of --official; add that, or leave it out.")
    read = _prompts(options)  # a suite that can't be read is told before torch is loaded
    from longspec.model.load import open_model

    with Progress(loading.model) as progress, ExitStack() as stack:
        opened = open_model(loading.model, dtype=loading.dtype, report=progress.report)
        opened.set_threads()
        engines = _engines(options, loading, kind.cache, drafting, opened, progress)
        others = {}
        if options.transformers:
            others["transformers prompt lookup"] = _prompt_lookup(opened, stack, progress)
        asked = {"control": drafting.control, "num_speculative_tokens": drafting.num_speculative_tokens}
        results.take(_workload(options, read, engines, others, asked), progress)


def _prompts(options: DrafterOptions) -> dict[str, Any]:
    """The suite's first turns by category, or its records by task."""
    from longspec.bench.harness import read_suite, sample
    from longspec.bench.spec_bench import read_records

    if options.official:
        return read_records(options.suite, options.prompts)
    return sample(read_suite(options.suite), options.prompts)


def _engines(
    options: DrafterOptions, loading: Loading, cache: str, drafting: Loading, opened: Opened, progress: Progress
) -> dict[str, Engine]:
    """The engines by drafter, of one model; `none` is the first."""
    from longspec.bench.official import DRAFTERS
    from longspec.drafters import DRAFT_TOKENS
    from longspec.engine.engine import Engine
    from longspec.model.load import open_model

    model, smaller = opened.load(report=progress.report), None
    if loading.draft_model:
        smaller = open_model(loading.draft_model, dtype=model.dtype, report=progress.report).load()
    names = options.drafter or (DRAFTERS if options.official else ["auto"])
    return {
        name: Engine(
            model,
            drafter=name,
            cache=cache,
            draft_tokens=drafting.num_speculative_tokens or DRAFT_TOKENS,
            control=drafting.control,
            options={"draft": smaller} if smaller and (name == "auto" or "model" in name.split("+")) else {},
        )
        for name in dict.fromkeys(["none", *names])
    }


def _prompt_lookup(opened: Opened, stack: ExitStack, progress: Progress) -> Worker:
    import torch

    from longspec.bench.contenders import peers
    from longspec.bench.process import workers

    contenders = peers(["lookup"], opened.checkpoint, None, "", 0, torch.get_num_threads())
    [worker] = workers(contenders, stack, progress.report, progress.say, needed=True).values()
    return worker


def _workload(
    options: DrafterOptions,
    read: dict[str, Any],
    engines: dict[str, Engine],
    others: dict[str, Worker],
    asked: dict[str, Any],
) -> Workload:
    if options.official:
        from longspec.bench.official import NEW_TOKENS, OfficialWorkload

        asked["suite"] = sha256(options.suite.read_bytes()).hexdigest()[:16]  # kept answers are to its questions
        return OfficialWorkload(engines, read, options.max_new_tokens or NEW_TOKENS, others, options.answers, asked)
    from longspec.bench.drafters import DrafterWorkload

    return DrafterWorkload(engines, read, options.max_new_tokens or _NEW_TOKENS, others)
