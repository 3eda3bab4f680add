"""The probe that judges a drafted step, and its files.

    probe.json           threshold, sizes, the two models, how it was trained and what it did on held-out texts
    probe.safetensors    its weights

The input is the mean of the target's last hidden states, after the final norm, over the step's tokens; the output is
the probability that the target itself would go on with a step of this meaning (SemanticSpec, 2602.03708). What the
paper does with a second probe on the draft model's states, and a draw from the ratio of both, a threshold does here,
which was calibrated on held-out texts. A folder isn't trusted: sizes are bounded, shapes compared, and models by their
fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longspec.errors import ModelError, UsageError
from longspec.machine.files import read_json
from longspec.machine.schema import TABLE, TEXT, check, number, whole
from longspec.model.load import Model
from longspec.model.weights.safetensors import Shard, save_described
from longspec.semantic.steps import Steps

__all__ = ["ABOUT", "HIDDEN", "WEIGHTS", "Judge", "Judged", "Probe", "load_probe", "read_about", "save_probe"]

ABOUT, WEIGHTS = "probe.json", "probe.safetensors"

HIDDEN = 512
"""Width of the probe's two hidden layers, as in the paper."""

_VERSION = 1
_MOST_NBYTES = 1 << 20
_HINT = "`longspec train semantic` writes one"
_FIELDS = {
    "version": whole(_VERSION, _VERSION),
    "width": whole(1, 1 << 20),
    "hidden": whole(1, 1 << 14),
    "threshold": number(0.0, 1.0),
    "target": TABLE,
    "draft": TABLE,
    "report": TABLE,
}
_MODEL = {"name": TEXT, "lineage": TEXT}


class Judge(Protocol):
    """What the engine asks about every draft of a pass."""

    def __call__(self, session: Any, draft: Sequence[int], kept: int, states: Tensor) -> bool:
        """Whether a draft, a chain of n tokens of which exact verification keeps `kept`, is to be kept whole.

        states: [1 + n, width], the target's last hidden states, normed, of the last committed token and of each
        drafted one.
        """
        ...


class Probe(nn.Module):
    """An MLP over a step's mean state [r, width], which is first brought to mean 0 and deviation 1 by channel; gives
    logits [r].
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, hidden: int = HIDDEN, dropout: float = 0.3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self.layers((states - self.mean) / self.deviation)
        return logits[..., 0]

    @property
    def sizes(self) -> tuple[int, int]:
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        return first.in_features, first.out_features


@dataclass(slots=True)
class Judged:
    """A probe as the engine's judge. A step is accepted if its probability is above the threshold: at 1 none is.

    A step is judged by itself, in fp32 on a CPU, so that no other text of a pass has a part in it.
    """

    probe: Probe
    threshold: float
    steps: Steps
    report: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, session: Any, draft: Sequence[int], kept: int, states: Tensor) -> bool:
        if kept == len(draft) or not self.steps.over(draft):
            return False
        return self.probability(states[1:].float().mean(0).cpu()) > self.threshold

    def probability(self, state: Tensor) -> float:
        """Of a step's mean state [width]."""
        return float(torch.sigmoid(self.probe(state[None]))[0])


def save_probe(
    folder: str | Path, probe: Probe, threshold: float, target: Model, draft: Model, report: Mapping[str, Any]
) -> None:
    """Write a probe's files, each atomically, the description last.

    Raises:
        LongspecError: the files can't be written.
    """
    folder, (width, hidden) = Path(folder), probe.sizes
    about = {
        "version": _VERSION,
        "width": width,
        "hidden": hidden,
        "threshold": threshold,
        "target": {"name": target.name, "lineage": target.lineage},
        "draft": {"name": draft.name, "lineage": draft.lineage},
        "report": dict(report),
    }
    save_described(folder / WEIGHTS, probe.state_dict(), folder / ABOUT, about)


def read_about(folder: str | Path) -> dict[str, Any]:
    """A probe's checked description.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = Path(folder) / ABOUT
    about = read_json(path, _MOST_NBYTES, "The probe's description", hint=_HINT)
    check(f"The probe's description {path}", about, _FIELDS, UsageError, needed=frozenset(_FIELDS))
    for name in ("target", "draft"):
        check(f"The {name} of {path}", about[name], _MODEL, UsageError, needed=frozenset(_MODEL))
    return about


def load_probe(folder: str | Path, target: Model, draft: Model) -> Judged:
    """A folder's probe, for this target and this draft model.

    Raises:
        UsageError: the folder holds no probe, or one for other models.
        ModelError: its weights are damaged.
    """
    about = read_about(folder)
    for name, model in (("target", target), ("draft", draft)):
        known = about[name]
        if known["lineage"] != model.lineage:
            raise UsageError(
                f"The probe in {folder} was trained with the {name} model {known['name']!r}, whose weights or shape "
                f"are not those of {model.name}; take that model, or train a probe for these two."
            )
    if about["width"] != target.decoder.config.width:
        raise UsageError(f"{Path(folder) / ABOUT} is damaged: the probe's width is {about['width']}, and the target's "
                         f"is {target.decoder.config.width}; fetch it again, or train anew.")  # fmt: skip
    path, probe = Path(folder) / WEIGHTS, Probe(about["width"], about["hidden"])
    shard, state = Shard(path), probe.state_dict()
    for name, wanted in state.items():
        value = shard.take(name) if name in shard.names else None
        if value is None or value.dtype != torch.float32 or value.shape != wanted.shape:
            raise ModelError(f"{path} is damaged, or isn't of {ABOUT}: {name} should be {list(wanted.shape)} of "
                             "float32; fetch it again, or train anew.")  # fmt: skip
        if not bool(value.isfinite().all()) or (name == "deviation" and not bool((value > 0).all())):
            raise ModelError(f"{path} is damaged: {name} has values that can't be; fetch it again, or train anew.")
        state[name] = value
    probe.load_state_dict(state)
    probe.eval().requires_grad_(False)
    return Judged(probe, about["threshold"], Steps(target.vocabulary, target.end_tokens), about["report"])
