"""Prompt templates: files with TOML front matter and a Jinja body, rendered to a prompt for an input.

    +++
    description = "Translate a text."
    system = "You are a careful translator."
    temperature = 0
    [parameters.to]
    help = "the language to translate into"
    default = "English"
    +++
    Translate this text into {{ to }}:

    {{ input }}

Takes a file's bytes, which aren't trusted: a body can't call Python, and the sizes of file and prompt are bounded.
Gives values; knows no engine, no command option and no user folder.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta

from longspec.errors import UsageError
from longspec.machine.files import read_bytes
from longspec.sampling.parameters import PARAMETERS, Bounds
from longspec.text.limits import TemplateLimitError, limited
from longspec.text.sandbox import BoundedEnvironment

__all__ = ["INPUT", "Parameter", "Template", "check_name", "find", "names", "parse", "read"]

INPUT = "input"
"""The variable that holds the user's input."""

_FENCE = "+++"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MOST_TEMPLATE_NBYTES = 64 << 10
_MOST_PROMPT_LETTERS = 64 << 20
"""Limit of a rendered prompt in characters, as for a prompt without a template."""

_NUMBERS: Mapping[str, Bounds] = {"max_new_tokens": Bounds(int, least=1), **PARAMETERS}
_KEYS = ("description", "system", "stop", "regex", "choices", "parameters", *_NUMBERS)
_MARKS = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")
"""What a regular expression doesn't take as itself."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a template, set with `--param`; required if it has no default."""

    help: str
    default: str | None


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt template, with default options for generating its answer.

    defaults: engine options by name, including `system`, `stop` and `regex`.
    choices: the parameter that lists what the answer may be, with commas between.
    """

    name: str
    description: str
    body: str
    parameters: Mapping[str, Parameter]
    defaults: Mapping[str, Any]
    takes_input: bool
    choices: str | None = None

    def options(self, given: Mapping[str, str]) -> dict[str, Any]:
        """The options of its answer, with these parameters. Raises what `values` raises, or UsageError: no choices."""
        if self.choices is None:
            return dict(self.defaults)
        listed = self.values(given)[self.choices]
        names = [name for each in listed.split(",") if (name := " ".join(each.split()))]
        if not names:
            raise UsageError(f"The template {self.name} needs {self.choices} to choose from; give one, or several.")
        return {**self.defaults, "regex": "|".join(_MARKS.sub(r"\\\g<0>", name) for name in names)}

    def values(self, given: Mapping[str, str]) -> dict[str, str]:
        """Values of all parameters, from `given` and the defaults.

        Raises:
            UsageError: an unknown parameter was given, or a required one wasn't.
        """
        for name in given:
            if name not in self.parameters:
                raise UsageError(
                    f"The template {self.name} has no parameter {name!r}; "
                    + _offer(name, list(self.parameters), "it has", none="it has none at all.")
                )
        defaults = {name: each.default for name, each in self.parameters.items() if each.default is not None}
        values = {**defaults, **given}
        for name, parameter in self.parameters.items():
            if name not in values:
                meaning = f" ({parameter.help})" if parameter.help else ""
                raise UsageError(
                    f"The template {self.name} needs the parameter {name!r}{meaning}; give it: --param {name}=TEXT."
                )
        return values

    def render(self, text: str | None = None, given: Mapping[str, str] | None = None) -> str:
        """Render the prompt for an input.

        Raises:
            UsageError: the input or a parameter is missing or unknown, or the template fails.
        """
        values = self.values(given or {})
        if self.takes_input:
            if text is None:
                raise UsageError(f"The template {self.name} needs an {INPUT}, and none was given.")
            values[INPUT] = text
        try:
            return limited(lambda: self._written(values), sum(map(len, values.values()))).strip()
        except Exception as error:  # untrusted code may raise anything
            if isinstance(error, UsageError) and not isinstance(error, TemplateLimitError):
                raise
            raise UsageError(f"The template {self.name} failed: {_line(error)}; mend its body.") from error

    def _written(self, values: Mapping[str, str]) -> str:
        pieces, letters = [], 0
        for piece in _environment().from_string(self.body).generate(values):
            pieces.append(piece)
            letters += len(piece)
            if letters > _MOST_PROMPT_LETTERS:
                raise UsageError(
                    f"The template {self.name} makes more than {_MOST_PROMPT_LETTERS >> 20} Mi letters, "
                    "which is no prompt for any model."
                )
        return "".join(pieces)


def names(folders: Sequence[Path]) -> dict[str, Path]:
    """All templates in these folders, by name; an earlier folder has precedence."""
    found: dict[str, Path] = {}
    for folder in reversed(folders):
        if folder.is_dir():
            found |= {path.stem: path for path in folder.glob("*.md") if _NAME.fullmatch(path.stem)}
    return dict(sorted(found.items()))


def check_name(name: str) -> None:
    """Raise UsageError if the name isn't valid for a template."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} can't be a template's name; use up to 64 letters, digits, - and _.")


def find(name: str, folders: Sequence[Path]) -> Path:
    """Path of a template's file by its name; a name with a slash is a path itself.

    Raises:
        UsageError: no folder has a template of this name.
    """
    if "/" in name:
        return Path(name)
    known = names(folders)
    if name not in known:
        raise UsageError(f"There is no template {name!r}; " + _offer(name, list(known), "there are"))
    return known[name]


def read(path: Path) -> Template:
    """Read a template's file.

    Raises:
        UsageError: the file can't be read, or isn't a valid template.
    """
    data = read_bytes(path, _MOST_TEMPLATE_NBYTES, "The template", pipe=True)
    try:
        return parse(path.stem, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"The template {path} isn't text: byte {error.start} isn't UTF-8; save it as UTF-8.") from None
    except UsageError as error:
        raise UsageError(f"The template {path} {error}") from error


def parse(name: str, text: str) -> Template:
    """Parse a template. A text without front matter is a body only.

    Raises:
        UsageError: the template is invalid; the message continues a sentence that begins with the template's name.
    """
    table, body = _split(text.replace("\r\n", "\n"))
    if unknown := [key for key in table if key not in _KEYS]:
        raise UsageError(f"sets {unknown[0]!r} at its top; " + _offer(unknown[0], list(_KEYS), "it may set"))
    parameters = _parameters(table.get("parameters", {}))
    used = _variables(body)
    if wrong := sorted(used - {INPUT, *parameters}):
        raise UsageError(f"uses {wrong[0]!r}, which is no parameter; add [parameters.{wrong[0]}] at its top.")
    if idle := sorted(set(parameters) - used):
        raise UsageError(f"has the parameter {idle[0]!r} and doesn't use it; write {{{{ {idle[0]} }}}} or remove it.")
    choices = _text(table, "choices")
    if choices is not None and (choices not in parameters or "regex" in table):
        raise UsageError(f"sets 'choices' to {choices!r}; it must name a parameter, and 'regex' be left out.")
    description = _text(table, "description") or ""
    return Template(name, description, body, parameters, _defaults(table), INPUT in used, choices)


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Split into the front matter, parsed, and the body."""
    if text.split("\n", 1)[0].rstrip() != _FENCE:
        return {}, text
    lines = text.split("\n")
    end = next((at for at, line in enumerate(lines[1:], 1) if line.rstrip() == _FENCE), None)
    if end is None:
        raise UsageError(f"begins with {_FENCE} and has no second one; end its front matter with a line {_FENCE}.")
    try:
        return tomllib.loads("\n".join(lines[1:end])), "\n".join(lines[end + 1 :])
    except RecursionError:
        raise UsageError("has front matter that is nested too deeply; make it flatter.") from None
    except ValueError as error:  # not TOML, or a number of more digits than Python reads
        raise UsageError(f"has front matter that isn't TOML: {error}.") from error


def _parameters(table: object) -> dict[str, Parameter]:
    if not isinstance(table, dict):
        raise UsageError("sets 'parameters' to no table; write [parameters.NAME] for each.")
    parameters = {}
    for name, entry in table.items():
        if not _VARIABLE.fullmatch(name) or name == INPUT:
            raise UsageError(f"has a parameter {name!r}; a name is letters, digits and _, and not {INPUT!r}.")
        if not isinstance(entry, dict) or not set(entry) <= {"help", "default"}:
            raise UsageError(f"has a wrong parameter {name!r}; a parameter is a table with `help` and `default`.")
        parameters[name] = Parameter(_text(entry, "help") or "", _text(entry, "default"))
    return parameters


def _defaults(table: Mapping[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    if system := _text(table, "system"):
        defaults["system"] = system.strip()
    if "stop" in table:
        stop = [table["stop"]] if isinstance(table["stop"], str) else table["stop"]
        if not isinstance(stop, list) or not all(isinstance(each, str) and each for each in stop):
            raise UsageError(f"sets 'stop' to {stop!r}; it must be a text, or a list of texts, none of them empty.")
        defaults["stop"] = stop
    if expression := _text(table, "regex"):
        defaults["regex"] = expression
    for name, bounds in _NUMBERS.items():
        value: Any = table.get(name)
        if value is not None:
            if not bounds.hold(value):
                raise UsageError(f"sets {name!r} to {value!r}; it must be {bounds.number}.")
            defaults[name] = value
    return defaults


def _text(table: Mapping[str, Any], key: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"sets {key!r} to {value!r}; it must be a text.")
    return value


def _variables(body: str) -> set[str]:
    try:
        return limited(lambda: meta.find_undeclared_variables(_environment().parse(body)), 0)
    except TemplateSyntaxError as error:
        raise UsageError(f"has a body that isn't Jinja, at its line {error.lineno}: {_line(error)}.") from error
    except Exception as error:  # nested too deeply, too slow
        raise UsageError(f"has a body that can't be read ({_line(error)}); make it plainer.") from error


def _environment() -> BoundedEnvironment:
    """Sandboxed Jinja under limits, without loader and globals: a body can use its variables only."""
    environment = BoundedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.clear()
    return environment


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:300]


def _offer(wrong: str, known: list[str], words: str, none: str = "there are none.") -> str:
    """End of an error message: the names that are similar to `wrong`, else all known names."""
    if not known:
        return none
    if close := get_close_matches(wrong, known, n=3, cutoff=0.6):
        return f"did you mean {' or '.join(close)}?"
    return f"{words}: {', '.join(known)}."
