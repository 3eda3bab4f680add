"""Cost estimate of a training before it starts: tokens, FLOPs, and hours from a short measurement.

Takes a target, a recipe and prompts; runs a few steps of each stage and gives a `Plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from longspec.engine.engine import Engine
from longspec.heads.accuracy import judged
from longspec.heads.format import Trained, new_head
from longspec.heads.seen import Seen, batch_of, see
from longspec.model.load import Model
from longspec.training.distil import TOGETHER, Text
from longspec.training.loss import Drafted, loss_of
from longspec.training.train import Recipe, frequent

__all__ = ["Plan", "make_plan", "seconds_of_writing"]

_STEPS = 12  # engine steps that generation is measured over
_ANSWER = 128  # tokens of an answer, as it is assumed


@dataclass(frozen=True, slots=True)
class Plan:
    parameters: int  # trainable ones of the head
    distil_tokens: int  # to generate
    train_tokens: int  # token positions that the head is trained on, over all steps
    flops: float
    distil_hours: float
    train_hours: float
    validation_hours: float
    step_seconds: float  # of one training step

    @property
    def hours(self) -> float:
        return self.distil_hours + self.train_hours + self.validation_hours

    def __str__(self) -> str:
        return (
            f"the plan: {self.distil_tokens:,} tokens to write ({self.distil_hours:.2f} h), {self.train_tokens:,} rows "
            f"to train {self.parameters:,} parameters on ({self.train_hours:.2f} h, {self.step_seconds:.1f} s a step), "
            f"validation ({self.validation_hours:.2f} h): about {self.hours:.2f} h and {self.flops:.1e} operations "
            "by a short measurement"
        )


def make_plan(
    model: Model,
    recipe: Recipe,
    prompts: Sequence[str],
    held: Sequence[str],
    options: dict[str, Any],
    writer: Model | None = None,
) -> Plan:
    """Measure with an untrained head, which is then dropped; no files are written. Without prompts no text will be."""
    seconds_per_token = seconds_of_writing(writer or model, prompts, options) if prompts else 0.0
    distilled = recipe.tokens if prompts else 0
    length = min(recipe.window, model.decoder.config.context)
    size = model.decoder.config.vocabulary
    tokens = torch.randint(size, (length,), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    text = Text(0, max(1, length // 4), tokens)
    head = new_head(
        recipe.kind, model, depth=recipe.depth, window=recipe.window, tokens=frequent([text], recipe.draft_vocab, size)
    )
    seen = see(model, text.tokens, text.prompt, head.reads(model))
    step_seconds = _training(model, head, seen) * recipe.texts
    began = perf_counter()
    judged(model, head, [seen])  # some three times as long as a held-out prompt and its answer
    validation = (perf_counter() - began) / 3 * len(held) * (recipe.validations + 3)
    parameters = sum(parameter.numel() for parameter in head.module.parameters())
    target = sum(tensor.numel() for tensor in model.decoder.tensors() if tensor.dim() == 2)
    steps = round(recipe.minutes * 60 / step_seconds) if recipe.minutes else recipe.steps
    rows = steps * recipe.texts * length
    written = len(head.rows(model)) * model.decoder.config.width
    # 2 FLOPs per weight forward, 4 backward. The LM head is frozen: 2 backward.
    per_row = 6 * parameters + recipe.depth * 4 * written
    return Plan(
        parameters=parameters,
        distil_tokens=distilled,
        train_tokens=rows,
        flops=float(rows * per_row + 2 * 2 * target * distilled),
        distil_hours=distilled * seconds_per_token / 3600,
        train_hours=steps * step_seconds / 3600,
        validation_hours=validation / 3600,
        step_seconds=step_seconds,
    )


def seconds_of_writing(model: Model, prompts: Sequence[str], options: dict[str, Any]) -> float:
    """Approximate seconds per generated token in a batch of `TOGETHER`, with the prompts' prefill and the features."""
    engine = Engine(model, drafter="ngram", cache="dense")
    sessions = []
    for number in range(TOGETHER):
        session = engine.open(prompts[number % len(prompts)], key=str(number), **options)
        sessions.append(session)
    began = perf_counter()
    for session in sessions:
        for _ in engine.prefill(session):
            pass
    reading = (perf_counter() - began) / TOGETHER / _ANSWER
    began = perf_counter()
    for _ in range(_STEPS):
        if active := [session for session in sessions if session.finish_reason is None]:
            engine.step(active)
    written = sum(len(session.answer) for session in sessions)
    writing = (perf_counter() - began) / max(1, written)
    longest, config = max((session.tokens for session in sessions), key=len), model.decoder.config
    had = {config.layers: torch.zeros(len(longest), config.width)} if model.decoder.is_exact else None
    began = perf_counter()
    see(model, longest, 1, (), had)
    return reading + writing + (perf_counter() - began) / len(longest)


def _training(model: Model, head: Trained, seen: Seen) -> float:
    """Seconds of one text's forward and backward pass, after a warm-up."""
    drafted, layers = Drafted(model, head), head.reads(model)
    for _ in range(2):
        began = perf_counter()
        loss_of(model, head, drafted, *batch_of(model, [seen], layers, 0)).backward()  # type: ignore[no-untyped-call]
    return perf_counter() - began
