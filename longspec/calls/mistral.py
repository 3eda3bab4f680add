"""Calls as Mistral's models write them: behind [TOOL_CALLS], as a list of JSON, or since 2025 each with its [ARGS]."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping

from longspec.calls.format import Format, Tool, literal, schema_rule
from longspec.calls.reader import Reader, json_call

__all__ = ["Mistral", "MistralList"]

_MARK, _ARGS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_OPEN = re.compile(r"\s*\[\s*")
_CLOSE = re.compile(r'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}')
_NEXT = re.compile(r"\s*,\s*")
_LAST = re.compile(r"\s*\]")


class Mistral(Format):
    """`[TOOL_CALLS]f[ARGS]{...}`, again for each call."""

    mark = _MARK
    between = _MARK
    tokens = (_MARK, _ARGS, _ID)

    def is_of(self, template: str) -> bool:
        return _MARK in template and _ARGS in template

    def body(self, tool: Tool, name: str) -> list[str]:
        return [
            f"{name}: {literal(tool.name + _ARGS)} {name}_json",
            schema_rule(f"{name}_json", tool.parameters),
        ]

    def reads(self, reader: Reader, tools: Mapping[str, Tool]) -> Generator[None]:
        while (yield from reader.say_until(_MARK)):
            head = yield from reader.until(_ARGS)
            if head is None:
                reader.say(_MARK)
                return
            reader.begin(head.partition(_ID)[0].strip())
            yield from reader.object()


class MistralList(Format):
    """`[TOOL_CALLS] [{"name": "f", "arguments": {...}}]`."""

    mark = _MARK
    then = " ["
    between = ", "
    after = "]"
    tokens = (_MARK,)

    def is_of(self, template: str) -> bool:
        return _MARK in template

    def body(self, tool: Tool, name: str) -> list[str]:
        head = literal(f'{{"name": {literal(tool.name)}, "arguments": ')
        return [f'{name}: {head} {name}_json "}}"', schema_rule(f"{name}_json", tool.parameters)]

    def reads(self, reader: Reader, tools: Mapping[str, Tool]) -> Generator[None]:
        while (yield from reader.say_until(_MARK)):
            more = yield from reader.skip(_OPEN, 1)
            while more and (yield from json_call(reader, None, lambda name: True)):
                yield from reader.skip(_CLOSE, 60)
                more = yield from reader.skip(_NEXT, 1)
            yield from reader.skip(_LAST, 1)
