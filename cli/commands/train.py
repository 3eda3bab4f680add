"""`longspec train`: trains a draft head for a model, in a folder from which an interrupted run resumes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspec.cli.io.distinct import refuse_same_files
from longspec.cli.io.progress import Progress
from longspec.cli.options import parsers as readers
from longspec.cli.options.groups import Only, argument, group, option
from longspec.cli.options.loading import Loading
from longspec.cli.options.reporting import Reporting
from longspec.cli.options.writing import SamplingOptions
from longspec.errors import UsageError
from longspec.sampling.parameters import Bounds

if TYPE_CHECKING:
    from longspec.model.load import Model, Opened
    from longspec.training.train import Recipe

__all__ = ["EPILOG", "train"]

SEMANTIC = "semantic"

EPILOG = """\b
Examples:
  longspec train clover2 --prompts prompts.jsonl -o head --dry-run
  longspec train clover2 -m smollm2 --prompts prompts.jsonl -o head
  longspec run --drafter ./head "Why is the sky blue?"
  longspec train features -m smollm2 --prompts prompts.jsonl -o features
  longspec train clover -m smollm2 --features features -o other --minutes 40
  longspec train semantic -m LARGE --draft-model SMALL --prompts prompts.jsonl -o probe

\b
The model answers the prompts, and the head learns to foresee the answers. What
it will take is said before it starts. Interrupted or killed, the same command
goes on. The report goes to stdout, and to report.json in the folder. Several
heads are trained from one folder of features, which is written once.
"""


@group("Training")
class Training:
    """The head, its data, and the length of training."""

    head: str = argument(
        what="What to train: clover, clover2, exits, medusa, cerberus, parallelspec, specformer, transfer, eagle3 or "
        "fastmtp; or features: what they are trained on; or semantic: a probe for --accept semantic, which is lossy.",
        metavar="HEAD",
    )
    prompts: Path | None = option(
        None,
        'What the model answers: a line for each, an object with a "prompt", or with "turns".',
        metavar="FILE",
        once=True,
    )
    features: Path | None = option(
        None, "Train on this folder of features, instead of prompts.", metavar="DIR", once=True
    )
    output: Path = option(what="The head, and the work on it; or the features.", short="-o", metavar="DIR")
    layers: list[Any] | None = option(
        None,
        "Of the features: a layer whose states are kept; may be repeated. Those that any head reads, if left out.",
        metavar="N",
        parser=readers.whole(0),
        once=True,
    )
    minutes: float = option(
        0.0,
        "Train for about so long: as many steps as a measurement gives.",
        metavar="N",
        parser=readers.number(Bounds(float, 0.0, 60_000.0)),
    )
    steps: int = option(2000, "Steps; 2000 if left out.", metavar="N", parser=readers.whole(1))
    tokens: int = option(
        1000 * 1024, "Tokens that the model writes; 1000k if left out.", metavar="N", parser=readers.tokens
    )
    invent: int = option(
        0,
        "Of a hundred texts, N answer a prompt that the model invents itself; 0 if left out.",
        metavar="N",
        parser=readers.whole(0),
    )
    depth: int = option(
        5, "Tokens that are drafted behind each other; 5 if left out.", metavar="N", parser=readers.whole(1)
    )
    draft_vocab: int = option(
        8192,
        "Draft only the N most frequent tokens; 8192 if left out, 0 is all.",
        metavar="N",
        parser=readers.whole(0),
    )
    first: Path | None = option(
        None,
        "Go on from this head's folder, with the tokens that it drafts; an untrained one if left out.",
        flag="--from",
        metavar="HEAD",
    )
    texts: int = option(2, "Texts of a step, which workers share; 2 if left out.", metavar="N", parser=readers.whole(1))
    workers: int = option(
        1,
        "Processes of this machine that train together; 1 if left out.",
        metavar="N",
        parser=readers.whole(1),
        once=True,
    )
    listen: Any = option(
        None,
        "Where workers of other machines may join; of this one alone if left out.",
        metavar="HOST:PORT",
        parser=readers.address,
        once=True,
    )
    join: Any = option(
        None, "Be another worker of the training there.", metavar="HOST:PORT", parser=readers.address, once=True
    )
    int8: bool = option(False, "Store the head's matrices as int8.")
    dry_run: bool = option(False, "Say what it would take, and do nothing.", once=True)


def train(
    training: Training,
    loading: Annotated[Loading, Only("model", "draft_model", "device", "dtype", "threads")],
    sampling: Annotated[SamplingOptions, Only("temperature", "seed")],
    reporting: Annotated[Reporting, Only("as_json", "quiet")],
) -> None:
    """Train a head that drafts for a model, on what the model answers."""
    _check(training, loading.draft_model)
    refuse_same_files({"the output": training.output}, filter(None, [training.prompts, training.features]))
    if training.join is None and (training.workers > 1 or training.listen) and not training.dry_run:
        _gather(training, loading, reporting)
        return
    with Progress(loading.model, quiet=reporting.quiet) as progress:
        progress.report(f"loading {loading.model}")
        from longspec.heads import KINDS
        from longspec.training.distil import read_prompts
        from longspec.training.train import Recipe

        if training.head not in (*KINDS, "features", SEMANTIC):
            raise UsageError(f"There is no head named {training.head!r}; use one of: {', '.join(KINDS)}; or features, "
                             "or semantic.")  # fmt: skip
        prompts = [] if training.prompts is None else read_prompts(training.prompts)
        if training.head == SEMANTIC:
            _semantic(training, loading, sampling, prompts, progress, as_json=reporting.as_json)
            return
        recipe = Recipe(
            training.head,
            training.steps,
            training.tokens,
            training.depth,
            training.draft_vocab,
            sampling.seed or 0,
            texts=training.texts,
            invented=training.invent,
            greedy=sampling.temperature is None,
            minutes=training.minutes,
        )
        if training.head == "features":
            said = _features(training, loading, sampling, recipe, prompts, progress)
            typer.echo(json.dumps(said, ensure_ascii=False) if reporting.as_json else f"Kept in {training.output}")
            return
        model, writer = _models(loading, progress)
        options = _sampling(model.defaults, sampling.temperature, recipe.seed)
        report = _head(training, model, writer, recipe, prompts, options, progress)
    if report is None:  # a dry run; a worker other than the one that reports
        return
    if reporting.as_json:
        typer.echo(json.dumps({**report, "folder": str(training.output)}, ensure_ascii=False))
    else:
        typer.echo(_table(report, training.output))


def _check(training: Training, draft_model: str | None) -> None:
    if (training.head == SEMANTIC) != (draft_model is not None):
        raise UsageError("A probe is trained for two models: `longspec train semantic` takes --draft-model, and no "
                         "other training does.")  # fmt: skip
    if training.head == SEMANTIC and (training.workers > 1 or training.listen or training.join or training.features):
        raise UsageError("A probe is trained on --prompts, by one process.")
    if (training.prompts is None) == (training.features is None):
        raise UsageError("A head is trained on --prompts or on --features: give one of the two.")
    if training.head == "features" and training.features is not None:
        raise UsageError("Features are written from --prompts; name the head that is to be trained on --features.")
    if training.head == "features" and (training.workers > 1 or training.listen or training.join):
        raise UsageError("Features are written by one process; --workers, --listen and --join are for heads.")
    if training.join and training.workers > 1:
        raise UsageError("One worker joins with --join; say it once for each, or start the others with --workers.")
    if training.layers and training.head != "features":
        raise UsageError("--layers is for `longspec train features`: a head reads those that it reads.")


def _gather(training: Training, loading: Loading, reporting: Reporting) -> None:
    """Start the workers, which are this command with --join, and wait for them."""
    from longspec.machine.system import quota
    from longspec.training.gathering import Gathering

    gathering = Gathering(*(training.listen or ()))
    place = f"{gathering.host}:{gathering.port}"
    if not reporting.quiet:
        typer.echo(f"longspec: {training.workers} workers; another one joins by the same command with --join {place}",
                   err=True)  # fmt: skip
    threads = loading.threads or max(1, int(quota() or os.cpu_count() or 1) // training.workers)
    command = [sys.executable, "-m", "longspec.cli.main", *sys.argv[1:], "--threads", str(threads)]
    command += ["--workers", "1", "--join", place]  # of an option that is said twice the last one holds
    if code := gathering.run(command, training.workers, ["--quiet"]):
        raise typer.Exit(code)


def _features(
    training: Training,
    loading: Loading,
    sampling: SamplingOptions,
    recipe: Recipe,
    prompts: list[str],
    progress: Progress,
) -> dict[str, Any]:
    from longspec.heads import KINDS
    from longspec.model.load import open_model
    from longspec.training.course import split
    from longspec.training.features import Content, layers_of, write_features
    from longspec.training.plan import seconds_of_writing

    opened = open_model(loading.model, dtype=loading.dtype, device=loading.device, report=progress.report)
    opened.set_threads(loading.threads)
    model = opened.load(report=progress.report)
    options = _sampling(model.defaults, sampling.temperature, recipe.seed)
    layers, count = training.layers or layers_of(list(KINDS), model), model.decoder.config.layers
    if max(layers) > count:
        raise UsageError(f"There is no layer {max(layers)}; {model.name} has {count}, and 0 is the embedding.")
    used, held = split(prompts, recipe.seed)
    content = Content(used, held, layers, options, recipe.tokens, recipe.window, recipe.invented, greedy=recipe.greedy)
    progress.report("measuring")
    hours = recipe.tokens * seconds_of_writing(model, used, options) / 3600
    progress.say(f"the plan: {recipe.tokens:,} tokens to write, about {hours:.2f} h by a short measurement")
    if not training.dry_run:
        write_features(model, training.output, content, progress.report)
    return {"folder": str(training.output), "layers": sorted({*layers, count}), **content.about(model)}


def _semantic(
    training: Training,
    loading: Loading,
    sampling: SamplingOptions,
    prompts: list[str],
    progress: Progress,
    *,
    as_json: bool,
) -> None:
    """Train a probe, and say what it does on prompts that it wasn't trained on."""
    from longspec.model.load import open_model
    from longspec.training.semantic import train_probe

    opened = open_model(loading.model, dtype=loading.dtype, device=loading.device, report=progress.report)
    opened.set_threads(loading.threads)
    smaller = open_model(str(loading.draft_model), dtype=opened.dtype, device=loading.device, report=progress.report)
    if training.dry_run:
        progress.say(f"{training.tokens:,} tokens of {opened.checkpoint.name} to write, with steps by "
                     f"{smaller.checkpoint.name}, for a probe of {opened.config.width} channels")  # fmt: skip
        return
    target, draft = opened.load(report=progress.report), smaller.load()
    options = _sampling(target.defaults, sampling.temperature, sampling.seed or 0)
    said = train_probe(
        target, draft, training.output, prompts, options,
        tokens=training.tokens, seed=sampling.seed or 0, report=progress.report,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**said, "folder": str(training.output)}, ensure_ascii=False))
    else:
        ranked = "" if said["area"] is None else f"ranks {said['area']:.0%} of pairs right, and "
        wrong = "" if said["wrong_held"] is None else f", of which {said['wrong_held']:.0%} meant something else"
        typer.echo(
            f"{said['examples']:,} drafted steps, {said['alike']:.0%} of which mean what the model wrote; on prompts "
            f"that it wasn't trained on it {ranked}accepts "
            f"{said['accepted_held']:.0%} above {said['threshold']:.2f}{wrong}\n"
            f"Kept in {training.output}: longspec run --draft-model {loading.draft_model} --accept "
            f"semantic:{training.output}, which is lossy"
        )


def _head(
    training: Training,
    model: Model,
    writer: Model | None,
    recipe: Recipe,
    prompts: list[str],
    options: dict[str, Any],
    progress: Progress,
) -> dict[str, Any] | None:
    from longspec.training.course import start
    from longspec.training.plan import make_plan

    course = start(model, recipe, training.output, prompts, options, writer, training.first, training.features)
    if training.join is None and (training.dry_run or training.features is None or not training.minutes):
        progress.report("measuring")
        progress.say(str(make_plan(model, recipe, course.prompts, course.held, course.options, course.writer)))
    return None if training.dry_run else course.run(progress.report, int8=training.int8, join=training.join)


def _models(loading: Loading, progress: Progress) -> tuple[Model, Model | None]:
    """The model that the head is trained on, and the one that generates its texts, if that is another one."""
    from longspec.model.load import native_dtype, open_model

    def opened(dtype: str) -> Opened:
        return open_model(loading.model, dtype=dtype, device=loading.device, report=progress.report)

    model, writer = opened(loading.dtype), None
    model.set_threads(loading.threads)
    native = native_dtype(model.device)
    if loading.dtype == "auto" and model.dtype != native:  # codes have no gradients, and torch may emulate bf16
        writer, model = model.load(report=progress.report), opened(native)
    return model.load(report=progress.report), writer


def _sampling(defaults: Any, temperature: float | None, seed: int) -> dict[str, Any]:
    """The model's sampling defaults; where these are greedy sampled at 0.7, so that one prompt gives several answers.
    If no temperature was asked for, every other text is greedy beside that.
    """
    chosen: dict[str, Any] = {"seed": seed}
    if temperature is not None:
        chosen["temperature"] = temperature
    elif not defaults.get("do_sample"):
        chosen["temperature"] = 0.7
    return chosen


def _table(report: dict[str, Any], folder: Path) -> str:
    shares = "  ".join(f"{share:.2f}" for share in report["accuracy"])
    return (
        f"{report['tokens_per_step']:.2f} tokens per step on prompts that it wasn't trained on, "
        f"{report['untrained_tokens_per_step']:.2f} untrained; {report['steps']:,} steps on {report['texts']:,} texts\n"
        f"Right behind true tokens, by depth: {shares}\n"
        f"Kept in {folder}: longspec run --drafter {_path(folder)}"
    )


def _path(folder: Path) -> str:
    """A path that can't be taken for a name."""
    return str(folder) if folder.is_absolute() or len(folder.parts) > 1 else f"./{folder}"
