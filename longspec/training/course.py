"""The training pipeline in one folder: texts, training, report. An interrupted run continues from the folder's files.

config.json, model.safetensors   the best head so far, for --drafter FOLDER
report.json, report.png          loss, accuracy and tokens per step
work/recipe.json                 the folder's recipe: a run with another one is refused
     texts.jsonl                 the texts that the target generated
     checkpoint.safetensors      parameters, optimizer state and progress
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.engine.engine import Engine
from longspec.errors import LongspecError, UsageError
from longspec.heads.format import Trained, load_head, new_head, save_head
from longspec.machine.files import read_json, replaced
from longspec.model.load import CODED, Model
from longspec.training.distil import Text, distil
from longspec.training.report import accuracies, tokens_per_step, write_report
from longspec.training.together import Together, together
from longspec.training.train import Progress, Recipe, frequent, ready, train

__all__ = ["Course", "start"]

Report = Callable[[str, int, int], None]

MOST_HELD = 16
"""Limit of the prompts held out for validation, which are a tenth of all."""


@dataclass(frozen=True, slots=True)
class Course:
    model: Model
    recipe: Recipe
    folder: Path
    prompts: Sequence[str]  # that training texts are generated from
    held: Sequence[str]  # held out for validation
    options: dict[str, Any]  # of `Engine.open`, for generating texts
    writer: Model  # generates the texts: the model itself, or the same in a faster dtype
    first: Trained | None = None  # a trained head as the starting point

    def run(self, report: Report, *, int8: bool = False) -> dict[str, Any] | None:
        """Train to the end, from the folder's state; returns the report, which is also written to the folder.

        In several processes started by torchrun all train, and only the first one writes and returns a report.

        Raises:
            UsageError: the folder holds another training, or no prompt can be used.
            LongspecError: a file can't be written.
        """
        with together(self.model.decoder.device) as company:
            if not company.first:
                company.wait()
                self._train(self._texts(report), report, company, int8=int8)
                return None
            self._claim(self.folder / "work")
            texts = self._texts(report)
            company.wait()
            head, progress = self._train(texts, report, company, int8=int8)
        model, best = self.model, load_head(self.folder, self.model)
        report("validating", 0, 0)
        untrained, written = tokens_per_step(model, ready(model, self._untrained(head.tokens)), self.held, self.options)
        size = model.decoder.config.vocabulary
        said = {
            "head": self.recipe.kind,
            "target": model.name,
            "dtype": model.dtype,
            "writer": self.writer.dtype,
            "recipe": asdict(self.recipe),
            "texts": len(texts),
            "draft_vocabulary": size if head.tokens is None else len(head.tokens),
            "steps": progress.step,
            "tokens_per_step": round(tokens_per_step(model, best, self.held, self.options)[0], 4),
            "untrained_tokens_per_step": round(untrained, 4),
            "accuracy": accuracies(model, best, written),
            "history": [[step, round(loss, 5), round(worth, 4)] for step, loss, worth in progress.history],
        }
        write_report(self.folder, said)
        return said

    def _texts(self, report: Report) -> list[Text]:
        return distil(
            Engine(self.writer, drafter="ngram", cache="dense"),
            self.prompts,
            self.folder / "work" / "texts.jsonl",
            tokens=self.recipe.tokens,
            length=min(self.recipe.window, self.model.decoder.config.context),
            options=self.options,
            report=report,
            invented=self.recipe.invented,
        )

    def _untrained(self, tokens: Tensor | None) -> Trained:
        recipe = self.recipe
        return new_head(
            recipe.kind, self.model, depth=recipe.depth, window=recipe.window, tokens=tokens, seed=recipe.seed
        )

    def _begun(self, tokens: Tensor | None) -> Trained:
        """The head at step 0: untrained, or with the weights and draft vocabulary of `first`."""
        head = self._untrained(tokens if self.first is None else self.first.tokens)
        if self.first is not None:
            head.module.load_state_dict(self.first.module.state_dict())
        return head

    def _train(
        self, texts: Sequence[Text], report: Report, company: Together, *, int8: bool
    ) -> tuple[Trained, Progress]:
        """The head after the last step, and the progress; the best head is written to the folder."""
        model, recipe = self.model, self.recipe
        head = self._begun(frequent(texts, recipe.draft_vocab, model.decoder.config.vocabulary, model.end_tokens))
        progress = train(
            model,
            head,
            texts,
            recipe,
            self.folder / "work" / "checkpoint.safetensors",
            validate=lambda made: tokens_per_step(model, made, self.held, self.options)[0],
            keep=lambda made: save_head(self.folder, made, model, int8=int8),
            report=report,
            company=company,
        )
        return head, progress

    def _claim(self, work: Path) -> None:
        """Write the recipe into a new folder; in a used one raise UsageError unless its recipe is the same."""
        said = json.loads(json.dumps({
            "recipe": asdict(self.recipe),
            "target": self.model.lineage,
            "dtype": self.model.dtype,
            "writer": self.writer.dtype,
            "prompts": sha256("\0".join(self.prompts).encode()).hexdigest(),
            "sampling": self.options,
            "first": None if self.first is None else _digest(self.first),
        }))  # fmt: skip
        path = work / "recipe.json"
        try:
            work.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                replaced(path, lambda place: place.write_text(json.dumps(said, indent=1) + "\n"))
        except OSError as error:
            raise LongspecError(f"{work} can't be used: {error.strerror}; name another folder.") from error
        begun = read_json(path, 1 << 16, "The recipe", hint="name another folder")
        other = [name for name in said if begun.get(name) != said[name]]
        if other:
            raise UsageError(f"{self.folder} holds another training (its {', '.join(other)} differ); ask for the same, "
                             "or name another folder.")  # fmt: skip


def start(
    model: Model,
    recipe: Recipe,
    folder: Path,
    prompts: Sequence[str],
    options: dict[str, Any],
    writer: Model | None = None,
    first: Path | None = None,
) -> Course:
    """Set up a training. Duplicate prompts are dropped, evenly spaced ones are held out for validation, and the others
    are shuffled by the seed, since a file may be sorted by kind.

    writer: the same model in the dtype in which it generates the texts; default: `model`. first: folder of a trained
    head as the starting point.

    Raises:
        UsageError: fewer than two prompts, an int8 model, or a first head of another kind or model.
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
    prompts = list({" ".join(prompt.split()).casefold(): prompt for prompt in prompts}.values())
    if len(prompts) < 2:
        raise UsageError(f"There {'is' if prompts else 'are'} {len(prompts) or 'no'} prompt{'' if prompts else 's'}; "
                         "a training needs two or more, since some are kept for validation.")  # fmt: skip
    count = min(MOST_HELD, max(1, len(prompts) // 10))
    kept = {i * len(prompts) // count for i in range(count)}
    distilled = [prompt for i, prompt in enumerate(prompts) if i not in kept]
    order = torch.randperm(len(distilled), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return Course(
        model,
        recipe,
        folder,
        [distilled[i] for i in order],
        [prompts[i] for i in sorted(kept)],
        options,
        writer or model,
        held,
    )


def _digest(head: Trained) -> str:
    """SHA-256 of a head's weights and draft vocabulary."""
    learned = [*head.module.state_dict().values(), *([] if head.tokens is None else [head.tokens])]
    return sha256(b"".join(value.double().cpu().numpy().tobytes() for value in learned)).hexdigest()
