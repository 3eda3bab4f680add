"""Options from environment variables and config.toml: defaults for options that the command line leaves out.

Takes the known names; gives a value for each one that is set, with its source. A name is its flag's, in snake case in
the file and as LONGSPEC_NAME in the environment, which takes precedence. Changes the file one name at a time, and
leaves its other lines unchanged.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from longspec.errors import LongspecError, UsageError
from longspec.machine.files import replaced
from longspec.machine.system import config_folder

__all__ = [
    "Kind",
    "Setting",
    "change",
    "config_path",
    "nearest",
    "read_settings",
    "read_table",
    "variable",
    "yes_or_no",
]

Kind = Literal["value", "flag", "list"]

_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class Setting:
    value: Any
    origin: str  # the source, as an error names it


def config_path() -> Path:
    """The path of the user's config.toml, whether it exists or not."""
    return config_folder() / "config.toml"


def read_settings(own: Mapping[str, Kind], every: Callable[[], Mapping[str, Kind]] | None = None) -> dict[str, Setting]:
    """The settings of these options, and what else the file sets. every: the options of all subcommands, where these
    are of one; asked for only where the file sets another one.

    Raises:
        UsageError: the file can't be read, has an unknown key, or a value is of the wrong type.
    """
    table = read_table()
    known = own if every is None or table.keys() <= own.keys() else every()
    return {**_from_file(table, known), **_from_environment(own)}


def _from_environment(known: Mapping[str, Kind]) -> dict[str, Setting]:
    settings = {}
    for name, kind in known.items():
        origin = variable(name)
        text = os.environ.get(origin, "")
        if not text:
            continue
        value: Any = yes_or_no(text, origin) if kind == "flag" else [text] if kind == "list" else text
        settings[name] = Setting(value, origin)
    return settings


def variable(name: str) -> str:
    """The name of a setting's environment variable."""
    return f"LONGSPEC_{name.upper()}"


def yes_or_no(text: str, origin: str) -> bool:
    """A boolean from a word. UsageError where it is none."""
    value = _WORDS.get(text.strip().lower())
    if value is None:
        raise UsageError(f"{origin}: {text!r} is neither yes nor no; use 1 or 0.")
    return value


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """The nearest known name as a phrase for an error; empty where none is near."""
    near = get_close_matches(name, known, 1)
    return f"; the nearest is {near[0]}." if near else ""


def _from_file(table: Mapping[str, Any], known: Mapping[str, Kind]) -> dict[str, Setting]:
    path, settings = config_path(), {}
    for name, value in table.items():
        origin = f"{name} in {path}"
        if name not in known:
            meant = nearest(name, known) or f"; it may set: {', '.join(sorted(known))}."
            raise UsageError(f"{path} sets {name!r}, which is no option{meant}")
        if known[name] == "list" and isinstance(value, str):
            value = [value]
        if not _fits(value, known[name]):
            wanted = {"flag": "true or false", "list": "a list of texts", "value": "a text or a number"}[known[name]]
            raise UsageError(f"{origin} is {value!r}; it must be {wanted}.")
        settings[name] = Setting(value, origin)
    return settings


def read_table() -> dict[str, Any]:
    """The content of config.toml, valid or not; empty without a file.

    Raises:
        UsageError: it can't be read, or isn't TOML.
    """
    path = config_path()
    try:
        return tomllib.loads(_text(path))
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"{path} isn't TOML: {error}.") from error


def change(name: str, value: Any) -> None:
    """Set a name in config.toml, or remove it (None); the file is replaced atomically.

    Raises:
        UsageError: the file can't be read, or isn't TOML.
        LongspecError: it can't be written.
    """
    import tomlkit

    path = config_path()
    read_table()
    document = tomlkit.parse(_text(path))
    if value is None:
        del document[name]
    else:
        document[name] = value
    _write(Path(os.path.realpath(path)), tomlkit.dumps(document).encode())


def _text(path: Path) -> str:
    """The file's text with its own line ends."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.") from error


def _write(path: Path, data: bytes) -> None:
    """Replace the file atomically, keeping its mode; a new one is private, as it may hold a key."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced(path, lambda place: place.write_bytes(data), private=True)
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror}.") from error


def _fits(value: object, kind: Kind) -> bool:
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "list":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float) and not isinstance(value, bool)
