"""Rendering of conversations by a checkpoint's chat template.

Takes a template's source with the tokenizer's special tokens, and messages; gives text. A template is untrusted code:
it runs in jinja2's sandbox, and whatever it raises becomes a UsageError. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from longspec.errors import UsageError

__all__ = ["ChatTemplate"]


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
        """
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled.render({**self._special, **given, **variables})
        except Exception as error:  # untrusted code may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise UsageError(
                f"The model's chat template failed ({reason}); change the messages, or send plain text (--raw)."
            ) from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """Variables that the template reads and doesn't set; empty if it can't be parsed."""
        try:
            return frozenset(meta.find_undeclared_variables(_environment().parse(self.source)))
        except Exception:  # noqa: BLE001  `render` raises the error
            return frozenset()

    @cached_property
    def _compiled(self) -> Template:
        return _environment().from_string(self.source)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """JSON without HTML escapes, unlike jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)
