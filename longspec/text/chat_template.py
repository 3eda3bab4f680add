"""Rendering of conversations by a checkpoint's chat template.

Takes a template's source with the tokenizer's special tokens, and messages; gives text. A template is untrusted code:
it runs under the limits of `longspec.text.limits`, and whatever it raises becomes a UsageError. Knows no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from longspec.errors import UsageError
from longspec.text.limits import MOST_SOURCE, TemplateLimitError, charge, limited, weigh
from longspec.text.sandbox import BoundedEnvironment

__all__ = ["ChatTemplate", "letters_of"]

_MOST_DEPTH = 100  # of lists and tables in messages
_MOST_INDENT = 100  # of JSON

_DATE = re.compile(r"(?:[^%]|%[-_0^#]?[A-Za-z%]){0,100}")
"""Forms of a date without widths: C's `strftime` pads to any."""


class ChatTemplate:
    """A chat template, given by its source; it is compiled at first use."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.source = source
        self._special = dict(special)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render messages; `variables` are passed to the template.

        Raises:
            UsageError: the template refuses the messages, or fails.
            TemplateLimitError: it wants more time, steps or letters than it may have.
        """
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        values = {**self._special, **given, **variables}
        try:
            return limited(lambda: _written(self._compiled, values), letters_of(values))
        except Exception as error:  # untrusted code may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            kind = TemplateLimitError if isinstance(error, TemplateLimitError) else UsageError
            raise kind(
                f"The model's chat template failed ({reason[:300]}); change the messages, or send plain text (--raw)."
            ) from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """Variables that the template reads and doesn't set; empty if it can't be parsed."""
        try:
            return limited(lambda: frozenset(meta.find_undeclared_variables(_parsed(self.source))), 0)
        except Exception:  # noqa: BLE001  `render` raises the error
            return frozenset()

    @cached_property
    def _compiled(self) -> Template:
        return _environment().from_string(_parsed(self.source))


def letters_of(value: object) -> int:
    """The letters in a JSON value, for the limits. Raises UsageError where it is nested too deeply for any template."""
    letters, rest, depth = 0, [value], 0
    while rest:
        depth += 1
        if depth > _MOST_DEPTH:
            raise UsageError(f"The messages are nested more than {_MOST_DEPTH} deep; send plainer ones.")
        letters += sum(len(one) for one in rest if isinstance(one, str))
        tables = [one for one in rest if isinstance(one, Mapping)]
        lists = [one for one in rest if isinstance(one, list | tuple)]
        letters += sum(len(key) for table in tables for key in table if isinstance(key, str))
        rest = [each for table in tables for each in table.values()] + [each for one in lists for each in one]
    return letters


def _parsed(source: str) -> nodes.Template:
    if len(source) > MOST_SOURCE:
        raise TemplateLimitError(f"it has more than {MOST_SOURCE:,} letters")
    return _environment().parse(source)


def _written(template: Template, values: Mapping[str, Any]) -> str:
    """The rendered text, whose pieces are counted as they come."""
    pieces = []
    for piece in template.root_render_func(template.new_context(dict(values))):
        charge(len(piece))
        pieces.append(piece)
    return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _date}
    return environment


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _date(form: str) -> str:
    if not _DATE.fullmatch(form):
        raise TemplateLimitError(f"it wants the date as {form[:40]!r}, which isn't up to 100 letters without widths")
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """JSON without HTML escapes, unlike jinja's own filter."""
    pieces = []
    # With an indent each element is a piece of its own, so that it is counted before the next is made.
    for piece in json.JSONEncoder(ensure_ascii=ensure_ascii, **_layout(**layout)).iterencode(weigh(value)):
        charge(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _layout(
    indent: int | str | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> dict[str, Any]:
    """What a template may say of the layout of JSON. Raises TemplateLimitError where it is wider than any is."""
    wide = [len(indent) if isinstance(indent, str) else indent or 0, *map(len, separators or ())]
    if max(wide) > _MOST_INDENT:
        raise TemplateLimitError(f"it indents JSON by more than {_MOST_INDENT} letters")
    return {"indent": indent, "separators": separators, "sort_keys": sort_keys}
