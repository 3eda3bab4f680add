"""The tools of one answer: checked, told to the chat template, held to their schemas, and their calls read.

Takes tools in OpenAI's format, as a caller or a stranger gives them; gives a template's value, a grammar and a reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from longspec.calls.format import Format, Tool, literal, schema_rule
from longspec.calls.reader import Reader
from longspec.errors import UsageError

__all__ = ["MOST_CALLS", "MOST_NBYTES", "MOST_TOOLS", "Toolbox"]

MOST_TOOLS = 128
"""As in OpenAI's API; agents have up to 60."""

MOST_NBYTES = 256 << 10
"""Of all tools as JSON; those of a large agent have 60 KB."""

MOST_CALLS = 16
"""Calls of an answer that is held to calls: a model that knows no end would write them until its context is full."""

_ANY = {"type": "object"}  # what arguments are held to by a schema that says nothing

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Toolbox:
    """Tools by name, and which of them must be called: choice is auto, none, required, or a name."""

    form: Format
    tools: Mapping[str, Tool]
    choice: str
    parallel: bool

    @classmethod
    def of(cls, form: Format | None, tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool) -> Toolbox:
        """Tools in OpenAI's format.

        Raises:
            UsageError: one isn't a tool, there are too many, or the model has no format for calls.
        """
        if len(tools) > MOST_TOOLS:
            raise UsageError(f"{len(tools)} tools are given; there may be {MOST_TOOLS}.")
        named: dict[str, Tool] = {}
        for i, each in enumerate(tools):
            tool = _tool(each, f"tools[{i}]")
            if tool.name in named:
                raise UsageError(f"Two tools are named {tool.name!r}; give each a name of its own.")
            named[tool.name] = tool
        try:
            nbytes = len(json.dumps([tool.told for tool in named.values()]))
        except RecursionError:
            raise UsageError("A tool's JSON schema is nested too deeply; make it flatter.") from None
        if nbytes > MOST_NBYTES:
            raise UsageError(f"The tools have {nbytes:,} bytes together; they may have {MOST_NBYTES:,}.")
        if choice not in ("auto", "none", "required", *named):
            raise UsageError(f"tool_choice is {choice!r}; it must be auto, none, required or a tool's name.")
        if form is None:
            raise UsageError(
                "This model's chat template takes no tools, or calls are written in a form that isn't known here; "
                "leave tools out, or take a model such as Qwen 2.5, Qwen 3, Llama 3, Mistral, Gemma 4 or gpt-oss."
            )
        return cls(form, named, choice, parallel)

    @property
    def told(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        return [tool.told for tool in self.tools.values()]

    @property
    def is_held(self) -> bool:
        """Whether a call must be written, or is held to its schema."""
        return self.choice not in ("auto", "none") or any(tool.strict for tool in self.tools.values())

    def reader(self) -> Reader:
        """For one answer."""
        return Reader(partial(self.form.reads, tools=self.tools))

    def grammar(self, prepare: Callable[[dict[str, Any]], dict[str, Any]], answer: object = None) -> str | None:
        """What an answer is held to, in llguidance's Lark; None where it may be anything.

        Calls are held to their schemas where one must be written, or where a tool is strict. prepare: makes a schema
        one to be compiled. answer: the JSON schema of an answer that calls nothing.

        Raises:
            UsageError: the schema is no mapping.
        """
        if answer is not None and not isinstance(answer, Mapping):
            raise UsageError("Beside tools an answer's JSON schema must be given as a mapping.")
        called = [self.tools[self.choice]] if self.choice in self.tools else [*self.tools.values()]
        must = self.choice not in ("auto", "none")
        if answer is None and not self.is_held:
            return None
        called = [replace(tool, parameters=prepare(dict(tool.parameters) or _ANY)) for tool in called]
        answer = None if answer is None else prepare(dict(answer))
        names = [f"call{i}" for i in range(len(called))]
        rules = [rule for name, tool in zip(names, called, strict=True) for rule in self.form.body(tool, name)]
        return "\n".join([*self._start(must, answer), f"call: {' | '.join(names)}", *rules, ""])

    def _start(self, must: bool, answer: Mapping[str, Any] | None) -> list[str]:
        form = self.form
        several = self.parallel and self.choice not in self.tools
        more = f"({literal(form.between)} call){{0,{MOST_CALLS - 1}}}" if several else ""
        calls = f"{_words(form.then)} call {more} {_words(form.after)}"
        if must:
            return [f"start: {literal(form.mark)} {calls}"]
        if answer is not None:
            return [f"start: {_words(form.lead)} answer | {literal(form.mark)} {calls}", schema_rule("answer", answer)]
        if form.alone:
            return [f"start: FREE | {literal(form.mark)} {calls}", r"FREE: /([^{\s](?s:.*))?/"]
        bare = re.escape(form.mark).replace("/", r"\/")
        return [
            f"start: FREE | lead {calls}",
            f"FREE: /(?s:.*)/ & ~/(?s:.*){bare}(?s:.*)/",
            f"lead[suffix={literal(form.mark)}]: /(?s:.*)/",
        ]


def _words(text: str) -> str:
    return literal(text) if text else ""


def _tool(given: object, place: str) -> Tool:
    function = (
        given.get("function") if isinstance(given, Mapping) and given.get("type", "function") == "function" else 0
    )
    if not isinstance(function, Mapping):
        raise UsageError(
            f"{place} isn't a function; it must have the type function, and a field function with its name."
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{place}.function.name is {name!r}; it must be 1 to 64 letters, digits, or one of _.-")
    if name in ("auto", "none", "required"):
        raise UsageError(f"{place}.function.name is {name!r}, which tool_choice means otherwise; give another name.")
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise UsageError(f"{place}.function.parameters isn't a JSON schema; it must be an object.")
    return Tool(name, str(function.get("description") or ""), parameters, function.get("strict") is True)
