"""The training loop of a head, with checkpoints and validation in the engine.

    loss = sum over depths i of 0.7^i (cross-entropy against the target's distribution + smooth L1 against its features)

Takes a target, its texts and a `Recipe`; keeps the head with the most tokens per step on held-out prompts. A step's
texts are a function of seed and step, and a checkpoint holds all state that a step changes: in fp32 on a CPU an
interrupted run ends with the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspec.errors import LongspecError, UsageError
from longspec.heads.draft_vocabulary import most_frequent
from longspec.heads.format import Trained
from longspec.heads.layers import unroll
from longspec.machine.files import replaced
from longspec.model.load import Model
from longspec.training.distil import Text
from longspec.training.features import Features
from longspec.training.together import ALONE, Together

__all__ = ["Progress", "Recipe", "frequent", "loss_of", "ready", "train"]

Report = Callable[[str, int, int], None]
Validate = Callable[[Trained], float]

DECAY = 0.7
"""Weight of a depth's loss relative to the depth before: a deeper token counts only if all before it are kept."""

SAVED = 300.0
"""Seconds between checkpoints."""

_BETAS, _CLIP, _WEIGHT_DECAY = (0.9, 0.95), 0.5, 0.01  # AdamW's betas, gradient norm limit, AdamW's weight decay
_PIECE = 128  # rows of logits that are computed at once
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
    texts: int = 8  # batch size of a step
    rate: float = 1e-3  # highest learning rate
    validations: int = 10
    invented: int = 0  # percentage of texts whose prompt the target generates
    patience: int = 4  # validations without improvement after which training stops

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
    best: float = 0.0  # tokens per step of the best validation
    since: int = 0  # validations since then
    history: tuple[tuple[int, float, float], ...] = ()  # step, loss, tokens per step


def frequent(texts: Sequence[Text], size: int, vocabulary: int, always: Sequence[int] = ()) -> Tensor | None:
    """Draft vocabulary: the most frequent tokens of the answers, ascending, including `always`; None is all tokens."""
    return most_frequent((text.tokens[text.prompt :] for text in texts), size, vocabulary, always)


def train(
    model: Model,
    head: Trained,
    texts: Sequence[Text],
    recipe: Recipe,
    checkpoint: Path,
    *,
    validate: Validate,
    keep: Callable[[Trained], None],
    report: Report,
    company: Together = ALONE,
) -> Progress:
    """Train the head in place, from the checkpoint if there is one. `keep` is called with every new best head.

    company: the processes of a data-parallel training; rank 0 validates, keeps and writes.

    Raises:
        LongspecError: the checkpoint can't be written, or the loss isn't finite.
        UsageError: the checkpoint is of another training.
    """
    usable = [text for text in texts if len(text.tokens) > recipe.depth + 2]
    if not usable:
        raise UsageError("There is no text to train on; ask for more tokens, or give other prompts.")
    parameters = list(head.module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY, foreach=False)
    progress = _load(checkpoint, head, optimizer)
    rows, hidden, saved = head.rows(model), Features(model.decoder), perf_counter()
    while progress.step < recipe.steps and progress.since < recipe.patience:
        step = progress.step
        report("training", step, recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        optimizer.zero_grad()
        chosen = [usable[i] for i in _order(recipe, len(usable), step)]
        running = company.add(parameters, _backward(model, head, rows, hidden, chosen, company))
        if not math.isfinite(running):
            raise LongspecError(f"The loss of step {step} is no number; train with another seed or in fp32.")
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP, foreach=False)
        optimizer.step()
        progress = replace(progress, step=step + 1)
        validating = progress.step % recipe.every == 0 or progress.step == recipe.steps
        if validating:
            report("validating", step, recipe.steps)
            made = ready(model, head)
            worth = company.tell(validate(made) if company.first else 0.0)
            better = worth > progress.best
            if better and company.first:
                keep(made)
            progress = replace(
                progress,
                best=max(worth, progress.best),
                since=0 if better else progress.since + 1,
                history=(*progress.history, (progress.step, running, worth)),
            )
        if company.first and (validating or perf_counter() - saved > SAVED):
            _save(checkpoint, head, optimizer, progress)
            saved = perf_counter()
    return progress


def _backward(
    model: Model, head: Trained, rows: Tensor, hidden: Features, chosen: Sequence[Text], company: Together
) -> float:
    """Accumulate the gradients of this process's share of a step's texts; returns its part of the loss per token."""
    total, running = sum(len(text.tokens) - text.prompt for text in chosen), 0.0
    for text in company.share(chosen):
        loss = loss_of(model, head, rows, text, hidden.of(text.number, text.tokens)) / total
        loss.backward()  # type: ignore[no-untyped-call]
        running += loss.item()
    return running


def loss_of(model: Model, head: Trained, rows: Tensor, text: Text, hidden: Tensor) -> Tensor:
    """Loss of a text, summed over the answer's positions and the depths.

    rows: [D, width], the target's LM head restricted to the draft vocabulary. hidden: [n, width], the target's hidden
    states before the final norm.
    """
    decoder, config = model.decoder, head.config(model)
    with torch.no_grad():
        wanted = decoder.normed(hidden).float()  # [n, width]
        scale = wanted.square().mean().sqrt().clamp_min(1e-6)  # makes the smooth L1 independent of the target's scale
        target = torch.softmax(_logits(wanted, rows, config.logit_softcap), -1)
        embedded = decoder.embed(torch.tensor(text.tokens[1:], device=decoder.device)).float()
    loss = hidden.new_zeros((), dtype=torch.float32)
    with torch.autocast(decoder.device.type, torch.bfloat16, enabled=model.dtype == "bf16"):
        outs = unroll(
            head.module, config, hidden[None, :-1].float(), head.module.token_norm(embedded)[None], head.depth
        )
        for i, out in enumerate(outs):
            first = max(0, text.prompt - 2 - i)  # position t predicts token t + i + 2; only answers count
            normed = head.module.norm(out[0, first:].float())
            behind = slice(first + i + 1, None)
            entropy = _CrossEntropy.apply(normed, rows, target[behind], config.logit_softcap)  # type: ignore[no-untyped-call]
            apart = F.smooth_l1_loss(normed / scale, wanted[behind] / scale, reduction="none").mean(-1).sum()
            loss = loss + DECAY**i * (entropy + apart)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of target [t, D] against the logits of normed [t, width], summed over t.

    The gradient is computed in the forward pass, in pieces that fit a core's cache: no [t, D] logits are kept. The LM
    head `rows` is frozen, and has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, normed: Tensor, rows: Tensor, target: Tensor, cap: float | None) -> Tensor:
        loss, gradient = normed.new_zeros(()), torch.empty_like(normed)
        for start in range(0, len(normed), _PIECE):
            own, wanted = normed[start : start + _PIECE], target[start : start + _PIECE]
            logits = _logits(own, rows, cap)
            whole = torch.logsumexp(logits, -1, keepdim=True)
            loss += whole.sum() - (wanted * logits).sum()
            slope = (logits - whole).exp_().sub_(wanted)
            if cap is not None:
                slope *= 1 - (logits / cap).square()
            gradient[start : start + _PIECE] = slope.to(rows.dtype) @ rows
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None


def ready(model: Model, head: Trained) -> Trained:
    """A copy for drafting: in the target's dtype, without gradients."""
    module = deepcopy(head.module).to(model.decoder.dtype).requires_grad_(False)
    return replace(head, module=module)


def _logits(normed: Tensor, rows: Tensor, cap: float | None) -> Tensor:
    """Logits [t, D] in fp32; the product is in the dtype of `rows`."""
    logits = (normed.to(rows.dtype) @ rows.T).float()
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _order(recipe: Recipe, count: int, step: int) -> Iterator[int]:
    """Indices of a step's texts: each epoch is a new permutation."""
    epoch, order = -1, torch.empty(0)
    for at in range(step * recipe.texts, (step + 1) * recipe.texts):
        if at // count != epoch:
            epoch = at // count
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator)
        yield int(order[at % count])


def _save(path: Path, head: Trained, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write parameters, both Adam moments and the progress to one file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, parameter in head.module.named_parameters():
        state = optimizer.state[parameter]
        tensors[f"{name}.value"] = parameter.detach()
        tensors |= {f"{name}.{moment}": state[moment] for moment in _MOMENTS}
    said = {"progress": json.dumps([progress.step, progress.best, progress.since, progress.history])}
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        replaced(path, lambda place: save_file(held, place, said))
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror or error}.") from error


def _load(path: Path, head: Trained, optimizer: torch.optim.Optimizer) -> Progress:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            step, best, since, history = json.loads((file.metadata() or {})["progress"])
            progress = Progress(
                int(step), float(best), int(since), tuple((int(a), float(b), float(c)) for a, b, c in history)
            )
            for name, parameter in head.module.named_parameters():
                with torch.no_grad():
                    parameter.copy_(_same(file.get_tensor(f"{name}.value"), parameter))
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
