"""What heads are trained on, as a folder: texts, the target's hidden states and its distributions.

    features.json        model, layers, held-out prompts, and every shard with its checksum; written anew after each
    texts.jsonl          the texts, one by one as the target wrote them
    held.safetensors     greedy answers to held-out prompts, as in a shard
    shard-00000.safetensors
        tokens [r] int32, starts [m + 1], prompts [m] int64     m texts without their last tokens, one behind the other
        layer.N [r, W] bf16          hidden states after N of the target's layers, before any norm
        top [r, k] int32, probs [r, k] fp16, rest [r] fp32      the likeliest next tokens, and what all others have

A folder is written once for a model and a file of prompts, and any kind of head is trained from it. Writing goes on
where it was interrupted. A folder of another model, and a shard that isn't what was written, are refused.

Where a row's bits don't depend on the pass that it is in (`Decoder.is_exact`), hidden states are those that the model
had while it wrote, and no text is read a second time. A text's last token goes through no pass: it is the last thing to
be foreseen, and has no row.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch

from longspec.engine.engine import Engine
from longspec.errors import LongspecError, ModelError, UsageError
from longspec.heads import KINDS
from longspec.heads.seen import TOP, Seen, see
from longspec.machine.files import opened, read_json, replaced
from longspec.machine.schema import FLAG, TABLE, TEXT, check, listed, whole
from longspec.model.load import Model
from longspec.model.weights.safetensors import Shard
from longspec.training.distil import Text, Watching, answered, distil

__all__ = ["MANIFEST", "Content", "Features", "layers_of", "write_features"]

Report = Callable[[str, int, int], None]

MANIFEST, HELD = "features.json", "held.safetensors"

TEXTS = 64
"""Texts of a shard: 25,000 rows, about 100 MB with three layers of the default model."""

_VERSION = 2
_MOST_NBYTES = 64 << 20  # of the manifest: held-out prompts, which have up to 1 MiB each
_HINT = "`longspec train features` writes one"
_FIELDS = {
    "version": whole(_VERSION, _VERSION),
    "lineage": TEXT,
    "model": TEXT,
    "about": TABLE,
    "layers": listed(whole(0, 1 << 16), 1 << 10),
    "held": listed(TEXT, 1 << 16),
    "answers": TABLE,
    "complete": FLAG,
    "shards": listed(TABLE, 1 << 20),
}
_SHARD = {"name": TEXT, "rows": whole(1, 1 << 40), "texts": whole(1, TEXTS), "sha256": TEXT}


@dataclass(frozen=True, slots=True)
class Content:
    """What a folder is to hold."""

    prompts: Sequence[str]  # that texts are generated from
    held: Sequence[str]  # prompts that validate a head, and have no texts
    layers: Sequence[int]  # of the target, whose states are kept
    options: Mapping[str, Any]  # of `Engine.open`
    tokens: int = 1_000_000  # of generated answers
    window: int = 512  # tokens of a text at most
    invented: int = 0  # percentage of texts whose prompt the target generates
    greedy: bool = False  # every other text is written at temperature 0

    def about(self, model: Model) -> dict[str, Any]:
        """What has to be the same for writing to go on."""
        said = {
            "dtype": model.dtype,
            "prompts": hashlib.sha256("\0".join(self.prompts).encode()).hexdigest(),
            "sampling": dict(self.options),
            "tokens": self.tokens,
            "window": self.window,
            "invented": self.invented,
            "greedy": self.greedy,
            "top": TOP,
        }
        found: dict[str, Any] = json.loads(json.dumps(said))
        return found


class Features:
    """A folder's texts, by number. Hidden states are read where they lie, through memory maps."""

    def __init__(self, shards: Sequence[Shard], answers: Shard, layers: Sequence[int], about: Mapping[str, Any]):
        self.layers, self.about = tuple(layers), about
        self._shards, self._answers = shards, answers
        self._starts = [shard.take("starts").tolist() for shard in shards]
        self._prompts = [shard.take("prompts").tolist() for shard in shards]
        self._firsts = [0, *accumulate(map(len, self._prompts))]

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def rows(self) -> int:
        return sum(starts[-1] for starts in self._starts)

    def text(self, number: int) -> Text:
        shard, at, rows = self._place(number)
        return Text(number, self._prompts[shard][at], self._shards[shard].take("tokens")[rows].tolist())

    def texts(self) -> list[Text]:
        return [self.text(number) for number in range(len(self))]

    def seen(self, number: int, layers: Sequence[int]) -> Seen:
        """A text with the states of some layers."""
        which, at, rows = self._place(number)
        return self._seen(self._shards[which], self._prompts[which][at], rows, layers)

    def held(self, layers: Sequence[int]) -> list[Seen]:
        """The greedy answers to held-out prompts, with the states of some layers."""
        starts, prompts = (self._answers.take(name).tolist() for name in ("starts", "prompts"))
        spans = zip(prompts, starts, starts[1:], strict=False)
        return [self._seen(self._answers, prompt, slice(start, end), layers) for prompt, start, end in spans]

    def _seen(self, shard: Shard, prompt: int, rows: slice, layers: Sequence[int]) -> Seen:
        return Seen(
            prompt,
            shard.take("tokens")[rows],
            {layer: shard.take(f"layer.{layer}")[rows] for layer in {*layers, self.layers[-1]} - {0}},
            *(shard.take(name)[rows] for name in ("top", "probs", "rest")),
        )

    def _place(self, number: int) -> tuple[int, int, slice]:
        shard = bisect_right(self._firsts, number) - 1
        at = number - self._firsts[shard]
        return shard, at, slice(self._starts[shard][at], self._starts[shard][at + 1])

    @classmethod
    def held_of(cls, folder: Path) -> list[str]:
        """The prompts that a folder holds out. The errors are those of `open`."""
        held: list[str] = _manifest(folder)["held"]
        return held

    @classmethod
    def open(cls, folder: Path, model: Model, kind: str) -> Features:
        """A folder that is complete, for training a kind of head. Every shard is read once, for its checksum.

        Raises:
            UsageError: there is none, it is of another model, or lacks a layer or its end.
            ModelError: a shard isn't what was written.
        """
        found = _manifest(folder)
        if found["lineage"] != model.lineage:
            raise UsageError(
                f"The features in {folder} are of {found['model']!r}, whose weights or shape are not those of "
                f"{model.name}; take the model that they were written with, or write others."
            )
        if not found["complete"]:
            raise UsageError(f"The features in {folder} aren't complete: their writing was interrupted; go on with the "
                             "same `longspec train features`.")  # fmt: skip
        lacking = sorted({*layers_of([kind], model)} - {*found["layers"]})
        if lacking:
            raise UsageError(f"The features in {folder} are of the layers {_said(found['layers'])}, and {kind} reads "
                             f"{_said(lacking)} too; write others with --layers.")  # fmt: skip
        shards = [_shard(folder, entry, found["layers"], model) for entry in found["shards"]]
        if not shards:
            raise UsageError(f"The features in {folder} hold no text; write others.")
        answers = _shard(folder, found["answers"], found["layers"], model)
        return cls(shards, answers, found["layers"], found["about"])


def layers_of(kinds: Sequence[str], model: Model) -> list[int]:
    """The layers that these kinds of heads read of a model, and its last one; without the embedding, which the tokens
    give.
    """
    count = model.decoder.config.layers
    return sorted({count, *(layer for kind in kinds for layer in KINDS[kind].reads_of(count))} - {0})


def write_features(model: Model, folder: Path, content: Content, report: Report) -> None:
    """Write a folder, or go on with one. model: in the dtype in which it writes the texts and is seen.

    Raises:
        UsageError: the folder holds other features, or no prompt can be used.
        LongspecError: a file can't be written.
    """
    about, wanted = content.about(model), sorted({*content.layers, model.decoder.config.layers})
    found: dict[str, Any] = {
        "version": _VERSION,
        "lineage": model.lineage,
        "model": model.name,
        "about": about,
        "layers": wanted,
        "held": list(content.held),
        "answers": {},
        "complete": False,
        "shards": [],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            before = _manifest(folder)
            other = [name for name in about if before["about"].get(name) != about[name]]
            other += [name for name in ("lineage", "layers", "held") if before[name] != found[name]]
            if other:
                raise UsageError(f"{folder} holds other features (their {', '.join(other)} differ); ask for the same, "
                                 "or name another folder.")  # fmt: skip
            if before["complete"]:
                return
            found["shards"], found["answers"] = before["shards"], before["answers"]
        _keep(folder, found)
        _write_all(model, folder, content, found, report)
        _keep(folder, {**found, "complete": True})
    except OSError as error:
        raise LongspecError(f"{folder} can't be written: {error.strerror or error}; name another folder.") from error


def _write_all(model: Model, folder: Path, content: Content, found: dict[str, Any], report: Report) -> None:
    """Write the texts and shards that the folder lacks, and say so in `found`, its manifest."""
    watching = Watching(found["layers"]) if model.decoder.is_exact else None
    engine = Engine(model, drafter="ngram" if watching is None else watching, cache="dense")
    length, options = min(content.window, model.decoder.config.context), dict(content.options)
    if not found["answers"]:
        report("answering held-out prompts", 0, 0)
        texts = answered(engine, content.held, length=length, options=options, watching=watching)
        if not texts:
            raise UsageError(f"No prompt that is held out has an answer within {length} tokens; give shorter ones, or "
                             "others.")  # fmt: skip
        found["answers"] = _write(model, folder / HELD, texts, found["layers"], watching)
        _keep(folder, found)
    written = distil(
        engine,
        content.prompts,
        folder / "texts.jsonl",
        tokens=content.tokens,
        length=length,
        options=options,
        report=report,
        invented=content.invented,
        greedy=content.greedy,
        watching=watching,
    )
    rest = islice(written, len(found["shards"]) * TEXTS, None)
    while texts := list(islice(rest, TEXTS)):
        number = len(found["shards"])
        report("reading texts", number * TEXTS, 0)
        path = folder / f"shard-{number:05d}.safetensors"
        found["shards"].append(_write(model, path, texts, found["layers"], watching))
        _keep(folder, found)


def _write(
    model: Model, path: Path, texts: Sequence[Text], layers: Sequence[int], watching: Watching | None
) -> dict[str, Any]:
    """Write a shard; returns its entry in the manifest."""
    from safetensors.torch import save_file

    seen = []
    for text in texts:
        had = None if watching is None else watching.states(text)
        states = None if had is None else dict(zip(layers, had, strict=True))
        seen.append(see(model, text.tokens[:-1], text.prompt, layers, states))
    joined = {f"layer.{layer}": torch.cat([each.states[layer] for each in seen]) for layer in layers}
    joined |= {name: torch.cat([getattr(each, name) for each in seen]) for name in ("tokens", "top", "probs", "rest")}
    joined["starts"] = torch.tensor([0, *accumulate(len(each.tokens) for each in seen)])
    joined["prompts"] = torch.tensor([text.prompt for text in texts])
    held = {name: value.cpu().contiguous() for name, value in joined.items()}
    replaced(path, lambda place: save_file(held, place))
    with opened(path, "The shard") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "rows": len(joined["tokens"]), "texts": len(texts), "sha256": digest}


def _shard(folder: Path, entry: Mapping[str, Any], layers: Sequence[int], model: Model) -> Shard:
    """A shard of the manifest, whose bytes and shapes are what they should be."""
    path, rows, texts = folder / entry["name"], entry["rows"], entry["texts"]
    with opened(path, "The shard", hint="write the features anew", error=ModelError) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise ModelError(f"{path} is damaged: its checksum isn't the one in {MANIFEST}; write the features anew.")
    shard, width = Shard(path), model.decoder.config.width
    top = min(TOP, model.decoder.config.vocabulary)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"layer.{layer}": (torch.bfloat16, (rows, width)) for layer in layers
    }
    wanted |= {
        "tokens": (torch.int32, (rows,)),
        "rest": (torch.float32, (rows,)),
        "starts": (torch.int64, (texts + 1,)),
    }
    wanted |= {
        "prompts": (torch.int64, (texts,)),
        "top": (torch.int32, (rows, top)),
        "probs": (torch.float16, (rows, top)),
    }
    for name, (dtype, shape) in wanted.items():
        if name not in shard.names or (shard.dtype(name), shard.shape(name)) != (dtype, shape):
            raise ModelError(f"{path} isn't what {MANIFEST} says: {name} should be {list(shape)} of "
                             f"{str(dtype).removeprefix('torch.')}; write the features anew.")  # fmt: skip
    starts, prompts, size = shard.take("starts"), shard.take("prompts"), model.decoder.config.vocabulary
    within = all(0 <= int(shard.take(name).min()) <= int(shard.take(name).max()) < size for name in ("tokens", "top"))
    lengths = starts.diff()
    if starts[[0, -1]].tolist() != [0, rows] or not bool(((prompts > 0) & (prompts <= lengths)).all()) or not within:
        raise ModelError(f"{path} holds texts or tokens that can't be of {model.name}; write the features anew.")
    return shard


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    found = read_json(path, _MOST_NBYTES, "The manifest of the features", hint=_HINT)
    check(f"The manifest {path}", found, _FIELDS, UsageError, needed=frozenset(_FIELDS))
    answers = [(HELD, found["answers"])] if found["answers"] or found["complete"] else []
    for name, entry in [*answers, *((f"shard-{i:05d}.safetensors", each) for i, each in enumerate(found["shards"]))]:
        check(f"The shard {name} of {path}", entry, _SHARD, UsageError, needed=frozenset(_SHARD))
        if entry["name"] != name:
            raise UsageError(f"The manifest {path} names the shard {entry['name'][:40]!r}; {_HINT}.")
    return found


def _keep(folder: Path, manifest: Mapping[str, Any]) -> None:
    replaced(folder / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n"))


def _said(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
