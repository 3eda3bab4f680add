"""Parsing of drafter specs (`--drafter`), and construction of the drafter.

    model:draft=Qwen/Qwen3-0.6B+ngram:floor=0.05        parts, the later ones drafting for the earlier; options of each

A part is a name in `DRAFTERS`, a drafter of another package (entry point `longspec.drafters`), the folder of a trained
head, or a kind of head that ships with longspec for the model. Errors in a spec are raised before a model is loaded.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from longspec.drafters import DRAFTERS, HEADS, way_of
from longspec.errors import UsageError
from longspec.heads import KINDS
from longspec.heads.format import CONFIG, fitting, is_head, read_about, read_config, shipped
from longspec.model.load import Model
from longspec.types import Drafter

__all__ = ["Part", "Spec", "parse", "published"]

GROUP = "longspec.drafters"
"""Entry point group in which other packages register drafters."""

_MOST = 1 << 20  # of an option that is a number: more tokens than a draft, and more than a vocabulary, has


@dataclass(frozen=True)
class Part:
    """One component of a spec: a drafter class and its options."""

    name: str
    kind: type[Drafter]
    options: Mapping[str, Any] = field(default_factory=dict)

    def takes(self) -> Mapping[str, inspect.Parameter]:
        """The drafter's options: keyword-only parameters of its `make`, by name."""
        parameters = inspect.signature(self.kind.make).parameters.values()
        return {one.name: one for one in parameters if one.kind is one.KEYWORD_ONLY}


@dataclass(frozen=True)
class Spec:
    """A parsed spec. Each part drafts for the one before it."""

    parts: Sequence[Part]

    @property
    def name(self) -> str:
        """The parts' names joined by +, without options."""
        return "+".join(part.name for part in self.parts)

    @property
    def kinds(self) -> list[type[Drafter]]:
        """The parts' classes."""
        return [part.kind for part in self.parts]

    def without(self, names: Collection[str]) -> Spec | None:
        """The parts of other names; None where the whole is named, or no part is left."""
        parts = [] if self.name in names else [part for part in self.parts if part.name not in names]
        return Spec(parts) if parts else None

    def make(self, model: Model) -> Drafter:
        """Construct the drafter for a loaded target.

        Raises:
            UsageError: an option or a head doesn't fit the model.
        """
        drafter: Drafter | None = None
        for part in reversed(self.parts):
            options = dict(part.options)
            if part.name in KINDS:
                options["folder"] = _shipped(part.name, model)
            drafter = part.kind.make(model, drafter, **options)
        assert drafter is not None
        return drafter

    def planned_bytes(self, target: Any) -> int:
        """Bytes that the drafter needs for the sequences of `target`, a `longspec.memory.plan.Request`."""
        total = 0
        for part in self.parts:
            options = dict(part.options)
            folders: Sequence[Path | None] = fitting(target.config) if part.name in KINDS else [None]
            for folder in folders:
                more = {} if folder is None else {"folder": folder}
                planned = {
                    name: value
                    for name, value in {**options, **more}.items()
                    if name in inspect.signature(part.kind.planned_bytes).parameters
                }
                once, text = part.kind.planned_bytes(target, **planned)
                total += once + text * target.texts
        return total


def parse(text: str, given: Mapping[str, Any] | None = None) -> Spec:
    """Parse a spec. given: further options, each for the first part that takes it; None values are ignored.

    Raises:
        UsageError: an unknown drafter or option, parts that can't be combined, or an option that no part takes.
    """
    options = {key: value for key, value in (given or {}).items() if value is not None}
    parts: list[Part] = []
    for name in _split(text):
        head, _, said = name.partition(":")
        if folder := head not in DRAFTERS and is_head(name):
            head, said = name, ""
        part = Part(head, _kind(head, text), {"folder": head} if folder else {})
        mine = {key: options.pop(key) for key in part.takes() if key in options}
        parts.append(Part(part.name, part.kind, {**part.options, **mine, **_said(part, said)}))
    for part in parts[:-1]:
        if not part.kind.takes_inner:
            known = {**DRAFTERS, **{kind: way_of(kind) for kind in KINDS}}
            raise UsageError(f"The drafter {part.name} takes no other's drafts; in {text!r} one of these comes first: "
                             f"{', '.join(name for name, kind in known.items() if kind.takes_inner)}.")  # fmt: skip
    if parts[1:] and not parts[-1].kind.serves:
        raise UsageError(
            f"The drafter {parts[-1].name} drafts for no other; name another one behind the + in {text!r}."
        )
    options.pop("set", None)  # a skip set without a drafter that skips is no error
    if "draft" in options:
        raise UsageError(f"A draft model has no effect with the drafter {text}; use model, or leave it out.")
    if options:
        raise UsageError(f"Texts to draft from (--draft-from, --remember) have no effect with the drafter {text}; "
                         "use suffix or auto, or leave them out.")  # fmt: skip
    for part in parts:
        if part.name == "model" and part.options.get("draft") is None:
            raise UsageError("The drafter model needs a draft model: name one (--draft-model, or model:draft=NAME).")
    return Spec(parts)


def published(raw: Mapping[str, Any]) -> type[Drafter] | None:
    """The drafter class for a head of others with this config.json; None for an unknown format."""
    return next((kind for kind, knows in HEADS.items() if knows(raw)), None)


def _split(text: str) -> list[str]:
    """Split at +, but not within the name of a head's folder."""
    parts = []
    while "+" in text and not os.path.isfile(os.path.join(text, CONFIG)):
        first, text = text.split("+", 1)
        parts.append(first)
    return [*parts, text]


def _kind(name: str, text: str) -> type[Drafter]:
    if name in DRAFTERS:
        return DRAFTERS[name]
    if name in KINDS:
        return way_of(name)
    if is_head(name):
        raw = read_config(name)
        kind = None if "longspec" in raw else published(raw)
        return kind or way_of(read_about(name)["kind"])
    if name == "auto":
        raise UsageError(f"auto isn't put over or under others, as in {text!r}: name them, or use auto alone.")
    for entry in entry_points(group=GROUP, name=name):
        try:
            kind = entry.load()
        except Exception as error:  # importing a foreign module may raise anything
            raise UsageError(
                f"The drafter {name} of the package {entry.dist and entry.dist.name} can't be imported ({error}); "
                "install it anew, or name another one."
            ) from error
        if not (isinstance(kind, type) and issubclass(kind, Drafter)):
            raise UsageError(f"The drafter {name} of the package {entry.dist and entry.dist.name} is no subclass of "
                             "longspec.Drafter; ask its authors.")  # fmt: skip
        return kind
    raise UsageError(f"There is no drafter named {name!r}; use auto or one of: {', '.join(DRAFTERS)}; or a "
                     f"trained head: its folder, or {' or '.join(KINDS)} where one comes along.")  # fmt: skip


def _said(part: Part, text: str) -> dict[str, Any]:
    """Parse a part's options, the text after its colon: key=value,key=value."""
    options: dict[str, Any] = {}
    takes = part.takes()
    for word in filter(None, text.split(",")):
        key, equals, value = word.partition("=")
        if key not in takes or not equals:
            known = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise UsageError(f"The drafter {part.name} has no option {word!r}; {known}, written name=value.")
        options[key] = _value(part.name, key, value, takes[key])
    return options


def _value(name: str, key: str, value: str, parameter: inspect.Parameter) -> Any:
    """Convert a value to the type of the parameter's default: bool (yes or no), int, float, tuple of one, or str. No
    drafter counts or measures below 0.
    """
    default = parameter.default
    try:
        if isinstance(default, bool):
            return {"yes": True, "no": False}[value]
        if isinstance(default, int | float):
            number = type(default)(value)
            if not 0 <= number <= _MOST:
                raise ValueError(number)
            return number
    except (ValueError, KeyError):
        wanted = "yes or no" if isinstance(default, bool) else f"a number from 0 to {_MOST:,}"
        raise UsageError(f"{key}={value} of the drafter {name} should be {wanted}.") from None
    return (value,) if isinstance(default, tuple) else value


def _shipped(kind: str, model: Model) -> Path:
    heads = shipped(model)
    if kind not in heads:
        raise UsageError(f"No {kind} head comes with longspec for {model.name}; name the folder of one (--drafter "
                         f"FOLDER), which `longspec train {kind}` writes.")  # fmt: skip
    return heads[kind]
