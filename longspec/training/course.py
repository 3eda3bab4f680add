"""The training pipeline in one folder: features, training, report. An interrupted run continues from its files.

config.json, model.safetensors   the best head so far, for --drafter FOLDER
report.json, report.png          loss, accuracy and tokens per step
work/recipe.json                 the folder's recipe: a run with another one is refused
     features/                   what the head is trained on, where no other folder of features was named
     checkpoint.safetensors      parameters, their average, optimizer state and progress
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from longspec.errors import UsageError
from longspec.heads.accuracy import accuracies, judged, worth
from longspec.heads.format import Trained, load_head, new_head, save_head
from longspec.heads.seen import Seen
from longspec.machine.files import read_json
from longspec.machine.schema import check, whole
from longspec.model.load import CODED, Model
from longspec.training.claim import claim, put_json
from longspec.training.features import MANIFEST, Content, Features, layers_of, write_features
from longspec.training.lanes import Lanes
from longspec.training.report import write_report
from longspec.training.ridge import begin
from longspec.training.together import Together, together
from longspec.training.train import Progress, Recipe, frequent, seconds_of_a_step, train

__all__ = ["Course", "split", "start"]

Report = Callable[[str, int, int], None]

VALIDATING, MEASURING = 0.1, 0.05
"""Of a budget in minutes, what validations may take; beside it, what may be spent on measuring a step."""

MOST_HELD = 64
"""Limit of the prompts held out for validation, which are a tenth of all."""


@dataclass(frozen=True, slots=True)
class Course:
    model: Model
    recipe: Recipe
    folder: Path
    prompts: Sequence[str]  # that training texts are generated from
    held: Sequence[str]  # held out for validation
    options: dict[str, Any]  # of `Engine.open`, for generating texts
    writer: Model  # generates the texts, and is what a head sees: the model itself, or the same in a faster dtype
    first: Trained | None = None  # a trained head as the starting point
    features: Path | None = None  # a folder of features, instead of prompts

    def run(self, report: Report, *, int8: bool = False, join: tuple[str, int] | None = None) -> dict[str, Any] | None:
        """Train to the end, from the folder's state; returns the report, which is also written to the folder.

        join: where the workers of this training are gathered, of which this process is to be one. All of them train,
        and only the one that leads in the end returns a report.

        Raises:
            UsageError: the folder holds another training, no prompt can be used, or no training answers there.
            LongspecError: a file can't be written, or this worker is given up.
        """
        lanes = Lanes.of(self.model.decoder.device)
        company = together(join, lanes)

        def said(stage: str, done: int, total: int) -> None:
            company.moves()
            report(stage, done, total)

        company.lead("features", lambda: self._prepare(said))
        features = self._features()
        found: list[dict[str, Any]] = []
        with lanes:
            head = self._begun(features, lanes)
            company.lead("steps", lambda: self._measure(features, head, said, lanes))
            recipe = self._recipe()
            progress = self._train(features, recipe, head, said, company, int8=int8)
            company.lead("report", lambda: found.append(self._report(features, recipe, progress)))
        return found[0] if found else None

    def _prepare(self, report: Report) -> None:
        self._claim(self.folder / "work")
        if self.features is None:
            write_features(self.writer, self._work, self.content(), report)

    def _report(self, features: Features, recipe: Recipe, progress: Progress) -> dict[str, Any]:
        model, head = self.model, load_head(self.folder, self.model)
        held = features.held(head.reads(model))
        untrained, _ = self._worth(self._untrained(features), held)
        trained, accuracy = self._worth(head, held)
        size = model.decoder.config.vocabulary
        said = {
            "head": recipe.kind,
            "target": model.name,
            "dtype": model.dtype,
            "recipe": asdict(recipe),
            "features": dict(features.about),
            "texts": len(features),
            "rows": features.rows,
            "parameters": sum(value.numel() for value in head.module.parameters()),
            "draft_vocabulary": size if head.tokens is None else len(head.tokens),
            "steps": progress.step,
            "tokens_per_step": round(trained, 4),
            "begun_tokens_per_step": round(progress.begun, 4),
            "untrained_tokens_per_step": round(untrained, 4),
            "accuracy": accuracy,
            "history": [[step, round(loss, 5), round(worth, 4)] for step, loss, worth in progress.history],
        }
        write_report(self.folder, said)
        return said

    def content(self) -> Content:
        """Of the folder's own features."""
        recipe = self.recipe
        return Content(
            self.prompts,
            self.held,
            layers_of([recipe.kind], self.model),
            self.options,
            recipe.tokens,
            recipe.window,
            recipe.invented,
            recipe.greedy,
        )

    @property
    def _work(self) -> Path:
        return self.folder / "work" / "features"

    def _features(self) -> Features:
        return Features.open(self.features or self._work, self.model, self.recipe.kind)

    def _measure(self, features: Features, begun: Trained, report: Report, lanes: Lanes) -> None:
        """Of a budget in minutes find the number of steps, once for the folder; and of validations, which may take a
        tenth of it.
        """
        path, recipe = self.folder / "work" / "steps.json", self.recipe
        if recipe.minutes and not path.exists():
            report("measuring", 0, 0)
            budget = recipe.minutes * 60
            seconds = seconds_of_a_step(self.model, begun, features, recipe, lanes, budget * MEASURING)
            began = perf_counter()
            self._worth(begun, features.held(begun.reads(self.model)))
            validations = int(budget * VALIDATING / (perf_counter() - began))
            put_json(path, {
                "steps": max(1, int(budget * (1 - VALIDATING) / seconds)),
                "validations": min(max(1, validations), recipe.validations),
                "seconds_of_a_step": seconds,
            })  # fmt: skip

    def _recipe(self) -> Recipe:
        """With the number of its steps."""
        if not self.recipe.minutes:
            return self.recipe
        path = self.folder / "work" / "steps.json"
        kinds = {"steps": whole(1, 1 << 40), "validations": whole(1, 1 << 10)}
        found = read_json(path, 1 << 16, "The number of steps", hint="delete it to measure anew")
        check(f"The file {path}", found, kinds, UsageError, needed=frozenset(kinds))
        return replace(self.recipe, steps=found["steps"], validations=found["validations"])

    def _tokens(self, features: Features) -> Tensor | None:
        model = self.model
        return frequent(features.texts(), self.recipe.draft_vocab, model.decoder.config.vocabulary, model.end_tokens)

    def _untrained(self, features: Features) -> Trained:
        recipe, first = self.recipe, self.first
        return new_head(
            recipe.kind,
            self.model,
            depth=recipe.depth,
            window=recipe.window,
            tokens=self._tokens(features) if first is None else first.tokens,
            seed=recipe.seed,
            reads=None if first is None else first.module.reads,
        )

    def _begun(self, features: Features, lanes: Lanes) -> Trained:
        """The head at step 0: what least squares find, or `first`, with its draft vocabulary."""
        head = self._untrained(features)
        if self.first is None:
            begin(self.model, head, features, lanes)
        else:
            head.module.load_state_dict(self.first.module.state_dict())
        return head

    def _train(
        self, features: Features, recipe: Recipe, head: Trained, report: Report, company: Together, *, int8: bool
    ) -> Progress:
        """Train the head in place; the best one is written to the folder."""
        model, held = self.model, features.held(head.reads(self.model))
        return train(
            model,
            head,
            features,
            recipe,
            self.folder / "work" / "checkpoint.safetensors",
            validate=lambda made: self._worth(made, held)[0],
            keep=lambda made: save_head(self.folder, made, model, int8=int8),
            report=report,
            company=company,
        )

    def _worth(self, made: Trained, held: Sequence[Seen]) -> tuple[float, list[float]]:
        """Tokens per step on the answers to held-out prompts, which calibrate the head, and its accuracy by depth."""
        told = judged(self.model, made, held)
        made.module.calibrate(told)
        return worth(made.module, told), accuracies(told)

    def _claim(self, work: Path) -> None:
        """Write the recipe into a new folder; in a used one raise UsageError unless its recipe is the same."""
        claim(work, {
            "recipe": asdict(self.recipe),
            "target": self.model.lineage,
            "dtype": self.model.dtype,
            "writer": self.writer.dtype,
            "prompts": sha256("\0".join(self.prompts).encode()).hexdigest(),
            "sampling": self.options,
            "first": None if self.first is None else _digest(self.first),
            "features": None if self.features is None else sha256((self.features / MANIFEST).read_bytes()).hexdigest(),
        })  # fmt: skip


def split(prompts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Prompts to train on and prompts held out. Duplicates are dropped, evenly spaced ones are held out, and the others
    are shuffled by the seed, since a file may be sorted by kind.

    Raises:
        UsageError: there are fewer than two.
    """
    prompts = list({" ".join(prompt.split()).casefold(): prompt for prompt in prompts}.values())
    if len(prompts) < 2:
        raise UsageError(f"There {'is' if prompts else 'are'} {len(prompts) or 'no'} prompt{'' if prompts else 's'}; "
                         "a training needs two or more, since some are kept for validation.")  # fmt: skip
    count = min(MOST_HELD, max(1, len(prompts) // 10))
    kept = {i * len(prompts) // count for i in range(count)}
    distilled = [prompt for i, prompt in enumerate(prompts) if i not in kept]
    order = torch.randperm(len(distilled), generator=torch.Generator().manual_seed(seed)).tolist()
    return [distilled[i] for i in order], [prompts[i] for i in sorted(kept)]


def start(
    model: Model,
    recipe: Recipe,
    folder: Path,
    prompts: Sequence[str],
    options: dict[str, Any],
    writer: Model | None = None,
    first: Path | None = None,
    features: Path | None = None,
) -> Course:
    """Set up a training, on prompts, some of which are held out (`split`), or on a folder of features.

    writer: the same model in the dtype in which it generates the texts; default: `model`. first: folder of a trained
    head as the starting point. features: a folder that `write_features` wrote; prompts are of no use then.

    Raises:
        UsageError: fewer than two prompts, an int8 model, a first head of another kind or model, or features that are
            no folder.
    """
    if model.dtype in CODED:
        raise UsageError("A head is trained on a model in bf16 or fp32, and drafts for its int8 form too: take "
                         "--dtype bf16.")  # fmt: skip
    if first is not None and first.resolve() == folder.resolve():
        raise UsageError(f"{first} can't be the head to go on from and the folder of the new one; name another folder.")
    held = None if first is None else load_head(first, model)
    if held is not None and held.kind != recipe.kind:
        raise UsageError(f"{first} holds a {held.kind} head, and {recipe.kind} is to be trained; name the kind or "
                         "the head that is wanted.")  # fmt: skip
    if held is not None:
        recipe = replace(recipe, draft_vocab=0 if held.tokens is None else len(held.tokens))
    if features is None:
        distilled, validating = split(prompts, recipe.seed)
    else:
        options, distilled, validating = {}, [], Features.held_of(features)
    return Course(model, recipe, folder, distilled, validating, options, writer or model, held, features)


def _digest(head: Trained) -> str:
    """SHA-256 of a head's weights and draft vocabulary."""
    learned = [*head.module.state_dict().values(), *([] if head.tokens is None else [head.tokens])]
    return sha256(b"".join(value.double().cpu().numpy().tobytes() for value in learned)).hexdigest()
