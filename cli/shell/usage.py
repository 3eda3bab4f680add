"""What programs do with their arguments: which of them are commands, code, or files to write (the table usage.toml).

Takes a program's name and the words after it; gives the parts that run or write something, each with its role. Knows
no harm: danger.py judges the parts.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from longspec.cli.shell.bash_ast import Word

__all__ = ["Part", "interpreters", "language", "parts", "plain_name"]

_INPUTS = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


@dataclass(frozen=True, slots=True)
class Part:
    """Words with a role.

    `+`: a command; `?`: one, if an option before it takes no value. `!`: a line of shell; `*`: one, joined from several
    words. `=`: a setting, whose value may be a line. `%`: code. `.`: a file or URL of code. `>`: a file that is
    replaced. `<`: the program's input is code; it has no words.
    """

    role: str
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, slots=True)
class _Usage:
    """A line of the table: `@language`, an operand's sign, `NAME` with the sign of the option's value, `<COUNT`.

    options: by name without dashes: `:` for a value that is text, a role for one that isn't; `+`, `?`: what follows is
    a command; `$`: the first operand is a line of shell; `^`: the input is code whatever the operands are.
    role, first: `+1`: a command behind one operand; `*1`: as a line; `2%`: the operands from the second on; `=`: all.
    reads: the input is code if there are fewer operands than this, and no code among the arguments.
    """

    options: dict[str, str] = field(default_factory=dict)
    role: str = ""
    first: int = 0
    language: str = ""
    reads: int = 0


@cache
def _usages() -> dict[str, _Usage]:
    """By name; a subcommand's behind its program's and a slash."""
    table = tomllib.loads((files("longspec.cli.shell") / "usage.toml").read_text(encoding="utf-8"))
    found = {name: _usage(spec) for names, spec in table.pop("programs").items() for name in names.split()}
    for programs, own in table.items():
        for program in programs.split():
            found[program] = _usage("& " + own.get("", ""))
            for name in " ".join(own).split():
                spec = next(spec for names, spec in own.items() if name in names.split())
                found[f"{program}/{name}"] = _usage(spec)
                if "/" in name:
                    found.setdefault(f"{program}/{name.split('/')[0]}", _usage("&"))
    return found


def _usage(spec: str) -> _Usage:
    options: dict[str, str] = {}
    role, first, language, reads = "", 0, "", 0
    for token in spec.split():
        match = re.fullmatch(r"([+*])(\d)|(\d)(\S)|([&=])|<(\d)|@(\w+)", token)
        if match is None:
            options[token[:-1]] = token[-1]
        elif match[6]:
            reads = int(match[6])
        elif match[7]:
            language = match[7]
        else:
            role = match[1] or match[4] or match[5]
            first = int(match[2] or 0) if match[1] else int(match[3] or 1) - 1
    return _Usage(options, role, first, language, reads)


def plain_name(text: str) -> str:
    """A program's name without its folder and, where only that is in the table, without its version."""
    name = text.rsplit("/", 1)[-1]
    return name if name in _usages() else re.sub(r"(?<=[a-z])-?[\d.]+$", "", name) or name


def language(name: str) -> str | None:
    """The language of a program's code; empty for shell, None for programs that take no code."""
    usage = _usages().get(name)
    if usage is None:
        return None
    return usage.language if usage.language or usage.reads or usage.role == "." else None


def interpreters() -> set[str]:
    """The names of programs that run code in a language other than shell."""
    return {name.split("/")[0] for name, usage in _usages().items() if usage.language}


def parts(name: str, words: Sequence[Word]) -> tuple[str, list[Part]]:
    """The parts of a program's arguments, and its name, behind which a subcommand's stands."""
    usage = _usages().get(name)
    if usage is None:
        return name, []
    found, operands, rest = _split(usage, words, plus=usage.options.get("c") == "$")
    if usage.role == "&" and rest:
        inner, more = parts(f"{name}/{rest[0].text}", rest[1:])
        return (inner if inner in _usages() else name), [*found, *more]
    if any(part.role == "$" for part in found):
        found = [part for part in found if part.role != "$"]
        found.append(Part("!", tuple(operands[:1])))
    elif usage.reads and _reads(usage, found, operands, rest):
        found.append(Part("<"))
    elif usage.reads == 1 and operands and not any(part.role in "%!" for part in found):
        found.append(Part(".", tuple(operands[:1])))
    if usage.role in ("+", "*") and rest:
        found.append(Part(usage.role, tuple(rest)))
    elif usage.role == "=":
        found += [Part("!", (Word(word.text.partition("=")[2], word.known),)) for word in operands if "=" in word.text]
    elif usage.role not in ("", "&"):
        last = usage.first + 1 if usage.role in "!." else None
        found += [Part(usage.role, (word,)) for word in operands[usage.first : last]]
    return name, found


def _reads(usage: _Usage, found: Sequence[Part], operands: Sequence[Word], rest: Sequence[Word]) -> bool:
    """Whether the program's input is code."""
    if any(part.role == "^" for part in found) or (usage.reads == 1 and operands and operands[0].text in _INPUTS):
        return True
    return len(operands) + len(rest) < usage.reads and not any(part.role in "%!.+?" for part in found)


def _split(usage: _Usage, words: Sequence[Word], *, plus: bool) -> tuple[list[Part], list[Word], Sequence[Word]]:
    """The options' values as parts, the operands, and what is behind the operands that have a meaning of their own.

    plus: options may begin with a plus sign too.
    """
    stop = usage.first if usage.role in ("+", "*", "&") else 1 if usage.reads == 1 else len(words)
    found: list[Part] = []
    operands: list[Word] = []
    at, is_open = 0, True
    while at < len(words):
        word, is_option = (
            words[at],
            is_open and len(words[at].text) > 1 and words[at].text[0] in ("-+" if plus else "-"),
        )
        if len(operands) >= stop and not (is_option and usage.role):
            break
        at += 1
        if not is_option:
            operands.append(word)
        elif word.text == "--":
            is_open = False
        else:
            values = _values(usage.options, word, words[at : at + 1])
            if runs := [role for role, _ in values if role in "+?"]:
                return [*found, Part(runs[0], tuple(words[at:]))], operands, ()
            found += [Part(role, () if value is None else (value,)) for role, value in values if role != ":"]
            at += any(value is following for _, value in values for following in words[at : at + 1])
            if not values and usage.role == "+" and word.text.startswith("--") and "=" not in word.text:
                found += [Part("?", tuple(words[at + 1 :]))] if at + 1 < len(words) else []
    while usage.role == "+" and at < len(words) and re.match(r"\w+=", words[at].text):
        at += 1
    return found, operands, words[at:]


def _values(options: dict[str, str], word: Word, following: Sequence[Word]) -> list[tuple[str, Word | None]]:
    """The roles of the options in a word, with their values: one by its name, or several letters."""
    text = word.text
    name, equals, value = text.lstrip("-+").partition("=")
    if text.startswith("--") or (len(name) > 1 and name in options):
        longer = (options[each] for each in options if len(name) > 2 and each.startswith(name))
        role = options.get(name) or next(longer, "")
        if not role or role in "+?$^":
            return [(role, None)] if role else []
        return [(role, Word(value, word.known) if equals else next(iter(following), Word("")))]
    found: list[tuple[str, Word | None]] = []
    for place, letter in enumerate(text[1:], 2):
        role = options.get(letter, "")
        if role and role in "+?$^":
            found.append((role, None))
        elif role:
            return [*found, (role, Word(text[place:], word.known) if text[place:] else next(iter(following), Word("")))]
    return found
