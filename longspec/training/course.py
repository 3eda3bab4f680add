"""A whole training in one folder: plan, texts, steps, report. What was done before is gone on with.

DIR/head.json, head.safetensors   the best head so far: what --drafter DIR takes
DIR/report.json, report.png       what it is worth
DIR/work/recipe.json              what this folder is of: another recipe is refused
DIR/work/texts.jsonl              what the target wrote
DIR/work/checkpoint.safetensors   where the training is
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from longspec.engine import Engine
from longspec.errors import LongspecError, UsageError
from longspec.heads.format import load_head, new_head, replaced, save_head
from longspec.model.load import Model
from longspec.training.distil import distil
from longspec.training.report import accuracies, tokens_per_step, write_report
from longspec.training.train import Recipe, frequent, ready, train

__all__ = ["Course", "start"]

Report = Callable[[str, int, int], None]

MOST_HELD = 16
"""Prompts that are kept for validation: a tenth, and no more than so many."""


@dataclass(frozen=True, slots=True)
class Course:
    model: Model
    recipe: Recipe
    folder: Path
    prompts: Sequence[str]  # that are distilled
    held: Sequence[str]  # that are not
    options: dict[str, Any]  # how texts are sampled

    def run(self, report: Report, *, int8: bool = False) -> dict[str, Any]:
        """Train to the end, or from where the folder is; gives the report, which is in the folder too.

        Raises:
            UsageError: the folder is of another training, or no prompt can be used.
            LongspecError: something can't be written.
        """
        work, model, recipe = self.folder / "work", self.model, self.recipe
        self._claim(work)
        length = min(recipe.window, model.decoder.config.context)
        texts = distil(
            Engine(model, drafter="ngram", cache="dense"),
            self.prompts,
            work / "texts.jsonl",
            tokens=recipe.tokens,
            length=length,
            options=self.options,
            report=report,
        )
        size = model.decoder.config.vocabulary
        tokens = frequent(texts, recipe.draft_vocab, size, model.end_tokens)
        head = new_head(recipe.kind, model, depth=recipe.depth, window=recipe.window, tokens=tokens, seed=recipe.seed)
        report("validating", 0, 0)
        untrained, written = tokens_per_step(model, ready(model, head), self.held, self.options)
        progress = train(
            model,
            head,
            texts,
            recipe,
            work / "checkpoint.safetensors",
            validate=lambda made: tokens_per_step(model, made, self.held, self.options)[0],
            keep=lambda made: save_head(self.folder, made, model, int8=int8),
            report=report,
        )
        best = load_head(self.folder, model)
        said = {
            "head": recipe.kind,
            "target": model.name,
            "dtype": model.dtype,
            "recipe": asdict(recipe),
            "texts": len(texts),
            "draft_vocabulary": size if tokens is None else len(tokens),
            "steps": progress.step,
            "tokens_per_step": round(tokens_per_step(model, best, self.held, self.options)[0], 4),
            "untrained_tokens_per_step": round(untrained, 4),
            "accuracy": accuracies(model, best, written),
            "history": [[step, round(loss, 5), round(worth, 4)] for step, loss, worth in progress.history],
        }
        write_report(self.folder, said)
        return said

    def _claim(self, work: Path) -> None:
        """Say in the folder what it is of, or see that it says the same."""
        said = json.loads(json.dumps({
            "recipe": asdict(self.recipe),
            "target": self.model.lineage,
            "dtype": self.model.dtype,
            "prompts": sha256("\0".join(self.prompts).encode()).hexdigest(),
            "sampling": self.options,
        }))  # fmt: skip
        path = work / "recipe.json"
        try:
            work.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                replaced(path, lambda place: place.write_text(json.dumps(said, indent=1) + "\n"))
            with path.open("rb") as file:
                held = json.loads(file.read(1 << 16))
        except (ValueError, RecursionError):
            held = None
        except OSError as error:
            raise LongspecError(f"{work} can't be used: {error.strerror}; name another folder.") from error
        if held != said:
            other = [name for name in said if not isinstance(held, dict) or held.get(name) != said[name]]
            raise UsageError(f"{self.folder} holds another training (its {', '.join(other)} differ); ask for the same, "
                             "or name another folder.")  # fmt: skip


def start(model: Model, recipe: Recipe, folder: Path, prompts: Sequence[str], options: dict[str, Any]) -> Course:
    """Divide the prompts: every so many-th is kept for validation.

    Raises:
        UsageError: there are fewer than two, or the window is longer than the model's context.
    """
    if len(prompts) < 2:
        raise UsageError(f"There {'is' if prompts else 'are'} {len(prompts) or 'no'} prompt{'' if prompts else 's'}; "
                         "a training needs two or more, since some are kept for validation.")  # fmt: skip
    count = min(MOST_HELD, max(1, len(prompts) // 10))
    kept = {i * len(prompts) // count for i in range(count)}
    return Course(
        model,
        recipe,
        folder,
        [prompt for i, prompt in enumerate(prompts) if i not in kept],
        [prompts[i] for i in sorted(kept)],
        options,
    )
