"""Heads of all kinds, and what they bring in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.engines import engine, finish

from longspec.drafters import drafter_of
from longspec.heads.format import Trained, load_head, new_head
from longspec.model.load import Model
from longspec.training.features import Features
from longspec.training.lanes import Lanes
from longspec.training.ridge import begin
from longspec.training.train import Recipe


def shaken(kind: str, model: Model, **options: Any) -> Trained:
    """A head whose every parameter matters."""
    head = new_head(kind, model, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return head


def some(model: Model) -> torch.Tensor:
    """Two thirds of the vocabulary."""
    return torch.tensor([i for i in range(model.decoder.config.vocabulary) if i % 3])


UNSEEN = ["".join(chr(48 + (7 * i + 3 * j * j + j) % 40) for j in range(12 + i % 5)) for i in range(30, 60)]
"""Prompts like those that the tests train on, which are the first thirty."""


def brought(
    model: Model, folder: Path, recipe: Recipe, options: dict[str, Any], prompts: Sequence[str] = ()
) -> tuple[float, float, float]:
    """Tokens per step in the engine, with drafts of the usual length: of the head untrained, as least squares begin it,
    and as it was trained. prompts: those that the training held out, if left out.
    """
    place, trained = folder / "work" / "features", load_head(folder, model)
    made = [
        new_head(recipe.kind, model, depth=recipe.depth, window=recipe.window, tokens=trained.tokens, seed=recipe.seed)
        for _ in range(2)
    ]
    begin(model, made[1], Features.open(place, model, recipe.kind), Lanes())
    found = []
    for head in (*made, trained):
        head.module.requires_grad_(False)
        drafting = engine(model, drafter_of(model, head))
        sessions = [
            drafting.open(prompt, key=f"held out {number}", **{**options, "max_new_tokens": 64})
            for number, prompt in enumerate(prompts or Features.held_of(place))
        ]
        finish(drafting, sessions)
        found.append(sum(one.stats.committed for one in sessions) / sum(one.stats.steps for one in sessions))
    return found[0], found[1], found[2]
