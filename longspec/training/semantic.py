"""A probe's training: steps that a draft model wrote, and what the target wrote in their places.

    probe.json, probe.safetensors   the probe, for --accept semantic:FOLDER
    work/recipe.json                the models and prompts: a run with others is refused
         group-00000.safetensors    drafted, own [s, W] bf16: mean states over each step, drafted and the target's own
         group-00000.json           tokens written; of each step its prompt and both texts; written last

The target answers the prompts with the draft model's steps verified exactly. A step that isn't kept whole is an
example: the pass had the target's states over it, and the answer goes on with what the target wrote instead. Whether
both mean the same is one draw of what SemanticSpec (2602.03708) estimates by twenty continuations, the share of the
step's cluster of meaning: the squared error has the same minimum, and each answer gives ten examples for the cost of
its own exact speculation. An interrupted training goes on with the next group of prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspec.drafters.spec import parse
from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.errors import ContextError, LongspecError, ModelError, UsageError
from longspec.machine.files import read_json, replaced
from longspec.machine.schema import TEXT, Kind, check, listed, row, whole
from longspec.model.load import Model
from longspec.model.weights.safetensors import Shard
from longspec.semantic.meaning import same
from longspec.semantic.probe import Probe, save_probe
from longspec.semantic.steps import STEP_TOKENS, Steps
from longspec.training.claim import claim
from longspec.training.course import split
from longspec.training.distil import TOGETHER

__all__ = ["ANSWER", "WRONG", "Examples", "Watch", "area", "fit", "limit_of", "train_probe"]

Report = Callable[[str, int, int], None]

ANSWER = 256
"""Most tokens of an answer to a prompt."""

WRONG = 0.05
"""Share of accepted steps that may mean something else, on held-out texts; what sets the threshold."""

_EPOCHS, _PATIENCE, _BATCH, _RATE = 50, 7, 128, 1e-3  # as in the paper
_STOPPING = 8  # of so many prompts one says when to stop
_LEAST = 40  # examples
_MOST_NBYTES = 64 << 20  # of a group's texts
_STEP: Kind = row(whole(0, 1 << 40), TEXT, TEXT)
_GROUP = {"tokens": whole(0, 1 << 40), "steps": listed(_STEP, 1 << 20)}


@dataclass(frozen=True, slots=True)
class _Try:
    """A drafted step that exact verification cut."""

    at: int  # the text's tokens before it
    draft: tuple[int, ...]
    state: Tensor  # [W], the mean over it


class Watch:
    """A judge that accepts nothing, and keeps what it sees."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._tries: defaultdict[Session, list[_Try]] = defaultdict(list)
        self._states: defaultdict[Session, list[Tensor]] = defaultdict(list)  # of each token from the prompt's last on

    def __call__(self, session: Session, draft: Sequence[int], kept: int, states: Tensor) -> bool:
        self._states[session].append(states[: 1 + kept].to(torch.bfloat16))
        if kept < len(draft) and self._steps.over(draft):
            self._tries[session].append(_Try(len(session.tokens), tuple(draft), states[1:].float().mean(0)))
        return False

    def examples(self, session: Session) -> list[tuple[str, str, Tensor, Tensor]]:
        """Of a finished text: each drafted step's text, that of the target's own, and the mean states of both."""
        tries, found = self._tries.pop(session, []), []
        states = torch.cat(self._states.pop(session)) if session in self._states else torch.empty(0)
        for one in tries:
            rest = session.tokens[one.at :]
            count = self._steps.first(rest) or (len(rest) if session.finish_reason == "stop" else 0)
            first = one.at - session.prompt_length + 1
            own = states[first : first + count]
            if count and len(own):
                texts = self._steps.text(one.draft), self._steps.text(rest[:count])
                found.append((*texts, one.state, own.float().mean(0)))
        return found


@dataclass(frozen=True, slots=True)
class Examples:
    """Steps that aren't the target's own, with what they were in place of."""

    prompts: Tensor  # [s] int64
    texts: Sequence[tuple[str, str]]  # drafted, and the target's own
    drafted: Tensor  # [s, W] fp32: the target's mean states over the step
    own: Tensor  # [s, W]

    def labels(self) -> Tensor:
        """[s] fp32: 1 where a step means what the target wrote."""
        centre = self.own.mean(0) if len(self.own) else self.own
        pairs = zip(self.texts, self.drafted - centre, self.own - centre, strict=True)
        return torch.tensor([float(same(*texts, (one, other))) for texts, one, other in pairs])


def train_probe(
    target: Model,
    draft: Model,
    folder: Path,
    prompts: Sequence[str],
    options: dict[str, Any],
    *,
    tokens: int,
    seed: int,
    report: Report,
) -> dict[str, Any]:
    """Train a probe into a folder, or go on; returns its report. options: of `Engine.open`, every other prompt is
    answered greedily. tokens: what the target writes.

    Raises:
        UsageError: the folder holds another training, the draft model doesn't fit, or the prompts gave too few steps.
        LongspecError: a file can't be written.
    """
    used, held = split(prompts, seed)
    order = [*held, *used]  # the held-out ones first, so that each amount of tokens has them
    work, width = folder / "work", target.decoder.config.width
    claim(work, {
        "target": target.lineage,
        "draft": draft.lineage,
        "dtype": [target.dtype, draft.dtype],
        "prompts": hashlib.sha256("\0".join(order).encode()).hexdigest(),
        "sampling": dict(options),
    })  # fmt: skip
    drafter = parse("model+ngram", {"draft": draft, "steps": True}).make(target)
    watch = Watch(Steps(target.vocabulary, target.end_tokens))
    engine = Engine(target, drafter=drafter, cache="dense", control="fixed", draft_tokens=STEP_TOKENS, judge=watch)
    groups, written = [order[first : first + TOGETHER] for first in range(0, len(order), TOGETHER)], 0
    least, examples = min(len(held) // TOGETHER + 2, len(groups)), []
    for number, group in enumerate(groups):
        if written >= tokens and number >= least:
            break
        report("writing texts", min(written, tokens), tokens)
        path = work / f"group-{number:05d}.json"
        if not path.exists():
            _write(engine, watch, path, group, number * TOGETHER, options)
        found, count = _read(path, width)
        examples.append(found)
        written += count
    report("training", 0, 0)
    whole_set = _joined(examples)
    probe, about = fit(whole_set, whole_set.prompts < len(held), seed)
    about = {"tokens": written, "prompts": min(len(order), len(examples) * TOGETHER), **about}
    save_probe(folder, probe, about["threshold"], target, draft, about)
    return about


def fit(examples: Examples, held: Tensor, seed: int) -> tuple[Probe, dict[str, Any]]:
    """A probe, and what it does on the held-out examples [s] bool, by which its threshold is set.

    Raises:
        UsageError: there are too few examples.
    """
    labels = examples.labels()
    if min(int(held.sum()), int((~held).sum())) < _LEAST:
        raise UsageError(f"The prompts gave {int((~held).sum())} drafted steps to train on and {int(held.sum())} held "
                         f"out, and {_LEAST} of each are needed; give more --tokens, or other prompts.")  # fmt: skip
    stopping = ~held & (examples.prompts % _STOPPING == 0)
    training = ~held & ~stopping
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        probe = Probe(examples.drafted.shape[1])
        probe.mean.copy_(examples.drafted[training].mean(0))
        probe.deviation.copy_(examples.drafted[training].std(0).clamp_min(1e-3))
        epochs = _train(
            probe, examples.drafted[training], labels[training], examples.drafted[stopping], labels[stopping]
        )
    chances = torch.sigmoid(probe(examples.drafted[held]))
    threshold = limit_of(chances.tolist(), labels[held].tolist())
    taken = chances > threshold
    return probe, {
        "examples": len(labels),
        "held": int(held.sum()),
        "alike": round(float(labels.mean()), 4),
        "alike_held": round(float(labels[held].mean()), 4),
        "epochs": epochs,
        "area": area(chances.tolist(), labels[held].tolist()),
        "threshold": threshold,
        "accepted_held": round(float(taken.float().mean()), 4),
        "wrong_held": round(float(1 - labels[held][taken].mean()), 4) if bool(taken.any()) else None,
    }


def _train(probe: Probe, states: Tensor, labels: Tensor, others: Tensor, theirs: Tensor) -> int:
    """Least squares by Adam, until the others' error has not fallen for some epochs; returns the best one's number."""
    optimizer = torch.optim.Adam(probe.parameters(), _RATE)
    best, at, kept = float("inf"), 0, {name: value.clone() for name, value in probe.state_dict().items()}
    for epoch in range(1, _EPOCHS + 1):
        probe.train()
        for rows in torch.randperm(len(labels)).split(_BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss = (torch.sigmoid(probe(states[rows])) - labels[rows]).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        probe.eval()
        with torch.no_grad():
            error = float((torch.sigmoid(probe(others)) - theirs).square().mean())
        if error < best:
            best, at = error, epoch
            kept = {name: value.clone() for name, value in probe.state_dict().items()}
        elif epoch - at >= _PATIENCE:
            break
    probe.load_state_dict(kept)
    probe.eval().requires_grad_(False)
    return at


def limit_of(chances: Sequence[float], labels: Sequence[float], wrong: float = WRONG) -> float:
    """The lowest threshold above which at most this share of the steps mean something else, by the rule of succession,
    (wrong + 1) / (accepted + 2), so that a few lucky steps don't set it; 1 where there is none.
    """
    pairs, mistakes, limit = sorted(zip(chances, labels, strict=True), reverse=True), 0.0, 1.0
    for count, (chance, label) in enumerate(pairs, 1):
        mistakes += 1 - label
        below = pairs[count][0] if count < len(pairs) else 0.0
        if below < chance and (mistakes + 1) / (count + 2) <= wrong:
            limit = below
    return limit


def area(chances: Sequence[float], labels: Sequence[float]) -> float | None:
    """The area under the curve of a probe: how often it puts a step that means the same above one that doesn't. None
    where there is no such pair.
    """
    ones = [chance for chance, label in zip(chances, labels, strict=True) if label > 0.5]
    others = [chance for chance, label in zip(chances, labels, strict=True) if label <= 0.5]
    won = sum((one > other) + 0.5 * (one == other) for one in ones for other in others)
    return round(won / (len(ones) * len(others)), 4) if ones and others else None


def _write(
    engine: Engine, watch: Watch, path: Path, prompts: Sequence[str], first: int, options: dict[str, Any]
) -> None:
    """Answer a group of prompts, numbered from `first`, and write its examples."""
    from safetensors.torch import save_file

    sessions: dict[int, Session] = {}
    for number, prompt in enumerate(prompts, first):
        asked = {**options, "temperature": 0.0} if number % 2 == 0 else options
        try:
            sessions[number] = engine.open(prompt, key=str(number), **asked)
        except ContextError:  # it leaves no room for an answer
            continue
        sessions[number].limit = min(sessions[number].limit, sessions[number].prompt_length + ANSWER)
        for _ in engine.prefill(sessions[number]):
            pass
    while active := [session for session in sessions.values() if session.finish_reason is None]:
        engine.step(active)
    found = [(number, *one) for number, session in sessions.items() for one in watch.examples(session)]
    width = engine.model.decoder.config.width
    drafted, own = (
        torch.stack([one[at] for one in found]) if found else torch.empty(0, width)  # type: ignore[misc]
        for at in (3, 4)
    )
    tensors = {"drafted": drafted.to("cpu", torch.bfloat16), "own": own.to("cpu", torch.bfloat16)}
    said = {"tokens": sum(len(session.answer) for session in sessions.values()), "steps": [one[:3] for one in found]}
    try:
        replaced(path.with_suffix(".safetensors"), lambda place: save_file(tensors, place))
        replaced(path, lambda place: place.write_text(json.dumps(said, ensure_ascii=False) + "\n", encoding="utf-8"))
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror or error}; name another folder.") from error


def _read(path: Path, width: int) -> tuple[Examples, int]:
    """A group's examples, and its number of written tokens."""
    said = read_json(path, _MOST_NBYTES, "The group of steps", hint="delete it to write it anew")
    check(f"The group {path}", said, _GROUP, UsageError, needed=frozenset(_GROUP))
    shard, steps = Shard(path.with_suffix(".safetensors")), said["steps"]
    for name in ("drafted", "own"):
        if name not in shard.names or (shard.dtype(name), shard.shape(name)) != (torch.bfloat16, (len(steps), width)):
            raise ModelError(f"{shard.path} isn't what {path.name} says; delete both to write them anew.")
    prompts = torch.tensor([number for number, _, _ in steps], dtype=torch.int64)
    texts = [(one, other) for _, one, other in steps]
    return Examples(prompts, texts, shard.take("drafted").float(), shard.take("own").float()), said["tokens"]


def _joined(parts: Sequence[Examples]) -> Examples:
    return Examples(
        torch.cat([one.prompts for one in parts]),
        [texts for one in parts for texts in one.texts],
        torch.cat([one.drafted for one in parts]),
        torch.cat([one.own for one in parts]),
    )
