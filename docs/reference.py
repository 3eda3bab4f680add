"""The commands as pages: what `longspec COMMAND --help` says, as values, and as Markdown.

Takes the command's own tree, so that a new option is on its page without anybody writing it there. docs/man.py makes
manual pages of the same values; docs/hooks.py puts the Markdown into the site.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from longspec.cli.app import program

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Page:
    """One command: every text as the help has it, unwrapped."""

    words: str  # longspec bench cache
    usage: str  # longspec bench cache [OPTIONS]
    summary: str
    more: list[str]  # paragraphs
    options: dict[str, list[tuple[str, str]]]  # heading: (how it is written, what it does)
    commands: list[tuple[str, str]]  # of a group
    notes: list[str]  # what stands below the options, as it is broken into lines

    @property
    def name(self) -> str:
        return self.words.replace(" ", "-")


def pages() -> list[Page]:
    """The program itself, then its commands in the order of the help, each group before its members."""
    return list(_walk(program(), "longspec"))


def _walk(command: Any, name: str, parent: Any = None) -> Iterator[Page]:
    context = typer.Context(command, info_name=name, parent=parent, **command.context_settings)
    words = context.command_path
    summary, *more = _paragraphs(command.help or "")
    members: dict[str, Any] = getattr(command, "commands", {})
    members = {name: member for name, member in members.items() if not member.hidden}
    options: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        if (record := parameter.get_help_record(context)) is not None:
            heading = getattr(parameter, "rich_help_panel", None) or "Other"
            options.setdefault(heading, []).append((_written(parameter, record[0]), _text(parameter, record[1])))
    options["Other"] = options.pop("Other")  # the last; --help is in it
    yield Page(
        words=words,
        usage=_usage(words, command.params, members),
        summary=summary,
        more=more,
        options=options,
        commands=[(name, _paragraphs(member.help or "")[0]) for name, member in members.items()],
        notes=_notes(command.epilog or ""),
    )
    for name, member in members.items():
        yield from _walk(member, name, context)


def _usage(words: str, parameters: list[Any], members: dict[str, Any]) -> str:
    """What must be given, then what may."""
    parts = [words]
    for parameter in parameters:
        if parameter.param_type_name == "option" and parameter.required:
            parts.append(f"{parameter.opts[0]} {parameter.metavar}")
    parts.append("[OPTIONS]")
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            parts.append(_argument(parameter) if parameter.required else f"[{_argument(parameter)}]")
    return " ".join([*parts, "COMMAND [ARGS]..."] if members else parts)


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _written(parameter: Any, shown: str) -> str:
    """Without a flag's negation, which each has; an argument by its name."""
    if parameter.param_type_name == "option":
        return shown.split(" / ")[0]
    return _argument(parameter)


def _text(parameter: Any, shown: str) -> str:
    return " ".join((getattr(parameter, "help", None) or shown).split())


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n")]


def _notes(text: str) -> list[str]:
    r"""`\b` begins a paragraph that keeps its lines."""
    return [part.strip("\n").rstrip() for part in re.split(r"\x08\n", text) if part.strip()]


def to_markdown() -> str:
    """All commands on one page."""
    lines = [
        "# Every command and option",
        "",
        "This page is made from the command itself. [The command](cli.md) says what a script may rely on: streams, "
        "exit codes, signals, settings. Every option but those that belong to one call can be set in the environment "
        "(`--max-new-tokens` is `LONGSPEC_MAX_NEW_TOKENS`) and in `config.toml` (`max_new_tokens`). Every flag without "
        "a value has its opposite: `--stats` and `--no-stats`, `--no-stream` and `--stream`.",
        "",
    ]
    for page in pages():
        lines += [f"## {page.words}", "", f"`{page.usage}`", "", _prose(page.summary), ""]
        for paragraph in page.more:
            lines += [_prose(paragraph), ""]
        if page.commands:
            lines += ["| command | |", "| --- | --- |"]
            for name, summary in page.commands:
                target = f"{page.name}-{name}"
                lines.append(f"| [`{name}`](#{target}) | {_prose(summary)} |")
            lines.append("")
        for heading, options in page.options.items():
            lines += [f"**{heading}**", "", "| option | |", "| --- | --- |"]
            lines += [f"| `{_cell(written)}` | {_prose(text)} |" for written, text in options]
            lines.append("")
        for note in page.notes:
            lines += ["```text", note, "```", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _prose(text: str) -> str:
    """Markdown's own signs in a help text stand for themselves, but for backticks."""
    quoted = re.split(r"(`[^`]*`)", _cell(text))
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]{}])", r"\\\1", part) for part in quoted)


if __name__ == "__main__":
    print(to_markdown())
