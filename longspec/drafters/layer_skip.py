"""Self-speculation: the target without some sub-layers as a drafter (Draft & Verify, 2309.08168; SWIFT, 2410.06916).

It reads the target's own KV cache, so that nothing is stored twice; the keys and values of its draft are inexact, and
their stage is dropped. The skipped sub-layers are a `Skip`: fixed by the caller, or searched while decoding, starting
from the set that `longspec tune` saved for the model, else from every fourth middle layer (`usual`).

A saved set is a small JSON file, which is checked when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from longspec.drafters.common.skip_search import Search
from longspec.drafters.common.tree_growth import grow
from longspec.errors import LongspecError, UsageError
from longspec.machine.files import read_json, replaced
from longspec.machine.system import config_folder
from longspec.model.decoder import Decoder, Rows, Skip
from longspec.model.load import Model
from longspec.types import Commit, Draft, Drafter, Verdict, Writing

__all__ = ["Skipping", "load_skip", "save_skip", "saved_path", "saved_skip", "usual"]

_KIND = "longspec skip set"
_VERSION = 1
_MOST_NBYTES = 1 << 16
"""Largest size of a skip set's file; a model of a thousand layers needs a sixth of it."""


class Skipping(Drafter):
    """Drafts by forward passes that skip sub-layers; `inner` may draft for these passes in turn.

    skip: a fixed set of sub-layers. Without one the set is searched while decoding, starting from `start`.
    """

    takes_inner = True

    def __init__(
        self, decoder: Decoder, skip: Skip | None = None, inner: Drafter | None = None, *, start: Skip | None = None
    ) -> None:
        self.decoder = decoder
        self.inner = inner
        first = usual(decoder.config.layers) if start is None else start
        self.search = Search(decoder, first) if skip is None else None
        self._given = skip
        self._prompts: WeakKeyDictionary[Writing, int] = WeakKeyDictionary()  # number of prompt tokens
        self._drafted: WeakKeyDictionary[Writing, int] = WeakKeyDictionary()  # tokens of the draft being verified

    @classmethod
    def make(cls, model: Model, inner: Drafter | None = None, *, set: str | Path | None = None) -> Drafter:  # noqa: A002
        """set: a file written by `longspec tune`, whose set is used unchanged."""
        fixed = None if set is None else load_skip(set, model.decoder.config.layers)
        return cls(model.decoder, fixed, inner, start=saved_skip(model))

    @property
    def skip(self) -> Skip:
        """The current set. It doesn't change while a draft is made."""
        if self.search is not None:
            return self.search.best
        assert self._given is not None
        return self._given

    def begin(self, session: Writing) -> None:
        self._prompts[session] = len(session.tokens)
        super().begin(session)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        drafts = grow(self, sessions, limits, ahead, inner=self.inner)
        if ahead is None:
            self._drafted.update({session: len(draft) for session, draft in zip(sessions, drafts, strict=True)})
        return drafts

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        """Report the verdict to the search, and let it try a set: here no stage of the step is open."""
        super().observe(session, commit, verdict)
        drafted = self._drafted.pop(session, None)
        if self.search is None:
            return
        self.search.step()
        if drafted:
            self.search.told(bool(verdict.kept))
        if drafted is not None and commit.finish_reason is None:
            prompt = self._prompts.setdefault(session, len(session.tokens))
            self.search.turn(session, len(session.tokens) - prompt)

    def open(self, session: Writing) -> tuple[Any, int, Sequence[int]]:
        return session.cache.open(), session.cache.length, session.unfed

    def forward(self, rows: Rows) -> Tensor:
        return self.decoder.forward(rows, skip=self.skip)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def grown(self, session: Writing, stage: Any, rows: Sequence[tuple[int, int]]) -> None:
        pass


def usual(layers: int) -> Skip:
    """Starting point without measurements: every fourth layer of the middle half, both sub-layers."""
    ends = max(1, layers // 4)
    left_out = frozenset(range(ends, layers - ends, 4))
    return Skip(left_out, left_out)


def saved_path(model: Model) -> Path:
    """Path of the model's saved set in the user's config directory, named by a hash of config and weights."""
    return config_folder() / "skip" / f"{model.fingerprint['model'][:32]}.json"


def saved_skip(model: Model) -> Skip | None:
    """The set that `longspec tune` has saved for the model; None where there is none.

    Raises:
        UsageError: the file is damaged, or written for another model.
    """
    path = saved_path(model)
    return load_skip(path, model.decoder.config.layers, model.fingerprint["model"]) if path.exists() else None


def load_skip(path: str | Path, layers: int, model: str | None = None) -> Skip:
    """Read a set for a model of `layers` layers. model: hash that the file must have been written for, if given.

    Raises:
        UsageError: the file can't be read, holds no set, or was written for another model.
    """
    found = read_json(Path(path), _MOST_NBYTES, "The skip set", hint="`longspec tune --output FILE` writes one")
    if found.get("kind") != _KIND or found.get("version") != _VERSION:
        raise UsageError(f"{path} is no skip set that this longspec knows; `longspec tune --output FILE` writes one.")
    if found.get("layers") != layers:
        raise UsageError(f"{path} is for a model of {found.get('layers')!r} layers, and this one has {layers}; "
                         "write one for it with `longspec tune`.")  # fmt: skip
    if model is not None and found.get("identity") != model:
        raise UsageError(f"{path} was written for another model; delete it, or run `longspec tune` again.")
    parts = {}
    for name in ("attention", "mlp"):
        listed = found.get(name)
        if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < layers for i in listed):
            raise UsageError(f"{path} is damaged: `{name}` must list layers from 0 to {layers - 1}; "
                             "write it anew with `longspec tune`.")  # fmt: skip
        parts[name] = frozenset(listed)
    return Skip(**parts)


def save_skip(path: str | Path, skip: Skip, model: Model, measured: Mapping[str, Any]) -> None:
    """Write the set atomically: another process reads the old file or the new one. measured: results to store with it.

    Raises:
        LongspecError: the file can't be written.
    """
    said = {
        "kind": _KIND,
        "version": _VERSION,
        "model": model.name,
        "identity": model.fingerprint["model"],
        "layers": model.decoder.config.layers,
        "attention": sorted(skip.attention),
        "mlp": sorted(skip.mlp),
        **measured,
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced(path, lambda place: place.write_text(json.dumps(said) + "\n", encoding="utf-8"))
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror}; name another file (--output).") from error
