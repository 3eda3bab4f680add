"""Options from the environment and from config.toml: what the command line leaves open.

Takes the names that may be set; gives a value for each that is, and the words for where it came from. A name is its
flag's, in snake case in the file and as LONGSPEC_NAME in the environment, which goes first.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longspec.errors import UsageError

__all__ = ["Kind", "Setting", "config_path", "read_settings"]

Kind = Literal["value", "flag", "list"]

_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class Setting:
    value: Any
    origin: str  # as an error names it


def config_path() -> Path:
    """Where the user's config.toml is, or would be."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "longspec" / "config.toml"


def read_settings(known: Mapping[str, Kind]) -> dict[str, Setting]:
    """All that is set.

    Raises:
        UsageError: the file can't be read, has a key that isn't known, or a value is of the wrong kind.
    """
    return {**_from_file(known), **_from_environment(known)}


def _from_environment(known: Mapping[str, Kind]) -> dict[str, Setting]:
    found = {}
    for name, kind in known.items():
        variable = f"LONGSPEC_{name.upper()}"
        text = os.environ.get(variable, "")
        if not text:
            continue
        value: Any = [text] if kind == "list" else text
        if kind == "flag":
            value = _WORDS.get(text.strip().lower())
            if value is None:
                raise UsageError(f"{variable}: {text!r} is neither yes nor no; use 1 or 0.")
        found[name] = Setting(value, variable)
    return found


def _from_file(known: Mapping[str, Kind]) -> dict[str, Setting]:
    path = config_path()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"{path} isn't TOML: {error}.") from error
    found = {}
    for name, value in table.items():
        origin = f"{name} in {path}"
        if name not in known:
            raise UsageError(f"{path} sets {name!r}, which is no option; it may set: {', '.join(sorted(known))}.")
        if known[name] == "list" and isinstance(value, str):
            value = [value]
        if not _fits(value, known[name]):
            wanted = {"flag": "true or false", "list": "a list of texts", "value": "a text or a number"}[known[name]]
            raise UsageError(f"{origin} is {value!r}; it must be {wanted}.")
        found[name] = Setting(value, origin)
    return found


def _fits(value: object, kind: Kind) -> bool:
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "list":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float) and not isinstance(value, bool)
