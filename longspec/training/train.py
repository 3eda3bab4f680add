"""The training loop of a head, with checkpoints and validation in the engine.

Takes a target, its features and a `Recipe`; keeps the head with the most tokens per step on held-out prompts, its
weights a moving average. A step's texts are a function of seed and step, each of which is a micro-batch with a number
that one thread computes, and gradients are added in the order of these; a checkpoint holds all state that a step
changes. So in fp32 on a CPU an interrupted run ends with the same bits whatever the number of threads, and so do
several workers, whoever of them dies or joins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from longspec.errors import LongspecError, UsageError
from longspec.heads.draft_vocabulary import most_frequent
from longspec.heads.format import Trained
from longspec.heads.seen import batch_of
from longspec.machine.files import replaced
from longspec.model.load import Model
from longspec.training.distil import Text
from longspec.training.features import Features
from longspec.training.lanes import Lanes
from longspec.training.loss import Drafted, loss_of
from longspec.training.together import Behind, Together

__all__ = ["Average", "Progress", "Recipe", "frequent", "ready", "seconds_of_a_step", "train"]

Report = Callable[[str, int, int], None]
Validate = Callable[[Trained], float]

SAVED = 300.0
"""Seconds between checkpoints."""

_BETAS, _CLIP, _WEIGHT_DECAY = (0.9, 0.95), 0.5, 0.01  # AdamW's betas, gradient norm limit, AdamW's weight decay
_KEPT = 0.999  # of the moving average in each step; less in the first ones
_LEAST_RATE = 0.1  # final learning rate of the cosine schedule, relative to the highest


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of a training; with the texts they determine the weights."""

    kind: str = "clover2"
    steps: int = 2000
    tokens: int = 1_000_000  # of generated answers
    depth: int = 5  # draft depths of the loss
    draft_vocab: int = 0  # size of the draft vocabulary; 0: all tokens
    seed: int = 0
    window: int = 512  # tokens of a text at most; attention window of the head's layers
    texts: int = 2  # of a step: few, so that equal rows make many steps
    rate: float = 5e-4  # highest learning rate; a greater one destroys what least squares found
    validations: int = 10
    invented: int = 0  # percentage of texts whose prompt the target generates
    patience: int = 4  # validations without improvement after which training stops
    greedy: bool = False  # every other text is written at temperature 0
    minutes: float = 0.0  # for the steps, whose number a measurement then gives; 0: `steps`

    @property
    def every(self) -> int:
        """Steps between validations."""
        return max(1, self.steps // self.validations)

    def rate_at(self, step: int) -> float:
        """Learning rate: linear warm-up over a twentieth of the steps, then a cosine schedule."""
        rising = max(1, self.steps // 20)
        if step < rising:
            return self.rate * (step + 1) / rising
        turn = (step - rising) / max(1, self.steps - rising)
        return self.rate * (_LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * turn)) / 2)


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a training."""

    step: int = 0
    begun: float = 0.0  # tokens per step of the head at the start
    best: float = 0.0  # of the best head since
    since: int = 0  # validations since the best of them
    history: tuple[tuple[int, float, float], ...] = ()  # step, loss, tokens per step

    def validated(self, loss: float, worth: float) -> Progress:
        """After a validation. worth: in tokens per step."""
        since = 0 if worth > self.best else self.since + 1
        history = (*self.history, (self.step, loss, worth))
        return replace(self, best=max(worth, self.best), since=since, history=history)


def frequent(texts: Sequence[Text], size: int, vocabulary: int, always: Sequence[int] = ()) -> Tensor | None:
    """Draft vocabulary: the most frequent tokens of the answers, ascending, including `always`; None is all tokens."""
    return most_frequent((text.tokens[text.prompt :] for text in texts), size, vocabulary, always)


class Average:
    """The moving average of a head's weights, in fp32. With few texts a step the weights themselves are noisy."""

    def __init__(self, head: Trained) -> None:
        self.values = {name: value.detach().clone() for name, value in head.module.named_parameters()}

    @torch.no_grad()
    def follow(self, head: Trained, step: int) -> None:
        """step: from 0. The average is about that of the last ninth of the steps, and of the last thousand at most."""
        kept = min(_KEPT, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [*head.module.parameters()], 1 - kept)

    def head(self, head: Trained) -> Trained:
        """The head with these weights."""
        module = deepcopy(head.module)
        module.load_state_dict(self.values, strict=False)
        return replace(head, module=module)


def train(
    model: Model,
    head: Trained,
    features: Features,
    recipe: Recipe,
    checkpoint: Path,
    *,
    validate: Validate,
    keep: Callable[[Trained], None],
    report: Report,
    company: Together,
) -> Progress:
    """Train the head in place, from the checkpoint if there is one. `keep` takes each head that is the best so far.

    company: the workers of a data-parallel training, one of which validates, keeps and writes.

    Raises:
        LongspecError: the checkpoint can't be written, or the loss isn't finite.
        UsageError: the checkpoint is of another training.
    """
    usable, parameters = _usable(features, recipe), list(head.module.parameters())
    optimizer, average = _optimizer(parameters, recipe), Average(head)
    progress = _load(checkpoint, head, optimizer, average)
    drafted, saved = Drafted(model, head), perf_counter()

    def save() -> None:
        _save(checkpoint, head, optimizer, average, progress)

    def judged() -> float:
        made = ready(model, average.head(head))
        worth = validate(made)
        if worth > max(progress.begun, progress.best):
            keep(made)
        return worth

    while progress.step < recipe.steps and progress.since < recipe.patience:
        if not progress.begun:
            progress = replace(progress, begun=company.lead("worth at the start", judged))
        step = progress.step
        report("training", step, recipe.steps)
        chosen = [usable[i] for i in _order(recipe, len(usable), step)]
        try:
            running = _backward(model, head, drafted, features, chosen, step, company, save)
        except Behind:
            progress = _load(checkpoint, head, optimizer, average)
            continue
        if not math.isfinite(running):
            raise LongspecError(f"The loss of step {step} is no number; train with another seed or in fp32.")
        _descend(optimizer, parameters, recipe.rate_at(step))
        average.follow(head, step)
        progress = replace(progress, step=step + 1)
        if progress.step % recipe.every == 0 or progress.step == recipe.steps:
            report("validating", step, recipe.steps)
            progress = progress.validated(running, company.lead(f"worth after {progress.step}", judged))
            company.lead(f"saved after {progress.step}", save)
            saved = perf_counter()
        elif company.first and perf_counter() - saved > SAVED:
            save()
            saved = perf_counter()
    return progress


def seconds_of_a_step(
    model: Model,
    head: Trained,
    features: Features,
    recipe: Recipe,
    lanes: Lanes,
    most: float,
    clock: Callable[[], float] = perf_counter,
) -> float:
    """The median of up to 12, after one more that warms up, of a copy of the head that is then dropped. most: the
    seconds after which no further one is measured.
    """
    scratch = replace(head, module=deepcopy(head.module))
    parameters, usable = list(scratch.module.parameters()), _usable(features, recipe)
    optimizer, average, drafted, took = _optimizer(parameters, recipe), Average(scratch), Drafted(model, scratch), []
    for step in range(13):
        began = clock()
        optimizer.zero_grad()
        chosen = [usable[i] for i in _order(recipe, len(usable), step)]
        _backward(model, scratch, drafted, features, chosen, step, Together(lanes))
        _descend(optimizer, parameters, recipe.rate_at(step))
        average.follow(scratch, step)
        took.append(clock() - began)
        if step and sum(took) > most:
            break
    return median(took[1:])


def _usable(features: Features, recipe: Recipe) -> list[int]:
    """Numbers of the texts that are long enough."""
    usable = [text.number for text in features.texts() if len(text.tokens) > recipe.depth + 2]
    if not usable:
        raise UsageError("There is no text to train on; ask for more tokens, or give other prompts.")
    return usable


def _optimizer(parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    made = torch.optim.AdamW(parameters, lr=recipe.rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY, foreach=False)
    for parameter in parameters:  # as it makes them itself, but before the first step: a checkpoint holds them
        moments = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in _MOMENTS}
        made.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return made


def _descend(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    torch.nn.utils.clip_grad_norm_(parameters, _CLIP, foreach=False)
    optimizer.step()


def _backward(
    model: Model,
    head: Trained,
    drafted: Drafted,
    features: Features,
    chosen: Sequence[int],
    step: int,
    company: Together,
    save: Callable[[], None] = lambda: None,
) -> float:
    """Set the gradients of a step, of whose texts each is a micro-batch; returns the loss per token."""
    parameters, layers = list(head.module.parameters()), head.reads(model)
    texts = [features.text(number) for number in chosen]
    tokens = sum(len(text.tokens) + 1 - text.prompt for text in texts)  # the last one has no row

    def gradient(number: int) -> Tensor:
        """[1 + P] fp32: the loss, and its gradient by all parameters."""
        seen = [features.seen(chosen[number], layers)]
        loss = loss_of(model, head, drafted, *batch_of(model, seen, layers, step * len(chosen) + number)) / tokens
        slopes = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return torch.cat([loss.detach().flatten(), *(slope.flatten() for slope in slopes)])

    sizes = [parameter.numel() for parameter in parameters]
    loss, *slopes = torch.split(company.sum(step, len(chosen), gradient, 1 + sum(sizes), save), [1, *sizes])
    for parameter, slope in zip(parameters, slopes, strict=True):
        parameter.grad = slope.view_as(parameter).to(parameter.device)
    return float(loss)


def ready(model: Model, head: Trained) -> Trained:
    """A copy for drafting: in the target's dtype, without gradients."""
    module = deepcopy(head.module).to(model.decoder.dtype).requires_grad_(False)
    return replace(head, module=module)


def _order(recipe: Recipe, count: int, step: int) -> Iterator[int]:
    """Indices of a step's texts: each epoch is a new permutation."""
    epoch, order = -1, torch.empty(0)
    for at in range(step * recipe.texts, (step + 1) * recipe.texts):
        if at // count != epoch:
            epoch = at // count
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator)
        yield int(order[at % count])


def _save(path: Path, head: Trained, optimizer: torch.optim.Optimizer, average: Average, progress: Progress) -> None:
    """Write parameters, their average, both Adam moments and the progress to one file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, parameter in head.module.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"{name}.value": parameter.detach(), f"{name}.average": average.values[name]}
        tensors |= {f"{name}.{moment}": state[moment] for moment in _MOMENTS}
    said = {"progress": json.dumps([progress.step, progress.begun, progress.best, progress.since, progress.history])}
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        replaced(path, lambda place: save_file(held, place, said))
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror or error}.") from error


def _load(path: Path, head: Trained, optimizer: torch.optim.Optimizer, average: Average) -> Progress:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            step, begun, best, since, history = json.loads((file.metadata() or {})["progress"])
            told = tuple((int(a), float(b), float(c)) for a, b, c in history)
            progress = Progress(int(step), float(begun), float(best), int(since), told)
            for name, parameter in head.module.named_parameters():
                with torch.no_grad():
                    parameter.copy_(_same(file.get_tensor(f"{name}.value"), parameter))
                average.values[name] = _same(file.get_tensor(f"{name}.average"), parameter)
                moments = {moment: _same(file.get_tensor(f"{name}.{moment}"), parameter) for moment in _MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(progress.step)), **moments}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is no checkpoint of this training ({error}); delete it to begin anew.") from error
    return progress


def _same(found: Tensor, wanted: Tensor) -> Tensor:
    if found.shape != wanted.shape:
        raise ValueError(f"a tensor is {list(found.shape)}, expected {list(wanted.shape)}")
    return found.to(wanted.device, torch.float32)


_MOMENTS = ("exp_avg", "exp_avg_sq")
