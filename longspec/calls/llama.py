"""Calls as Llama 3.1 to 3.3 write them: an answer that is JSON with a name and parameters."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping

from longspec.calls.format import Format, Tool, literal, schema_rule
from longspec.calls.reader import Reader, json_call

__all__ = ["Llama"]

_BEGIN = re.compile(r"\s*(?:<\|python_tag\|>)?\s*(?=\{)")
_CLOSE = re.compile(r"\s*\}")
_NEXT = re.compile(r"\s*;\s*(?=\{)")


class Llama(Format):
    """`{"name": "f", "parameters": {...}}`; a second call follows a semicolon."""

    mark = "{"
    between = "; {"
    alone = True
    tokens = ("<|python_tag|>",)

    def is_of(self, template: str) -> bool:
        return "ipython" in template and '"parameters"' in template

    def body(self, tool: Tool, name: str) -> list[str]:
        head = literal(f'"name": {literal(tool.name)}, "parameters": ')
        return [f'{name}: {head} {name}_json "}}"', schema_rule(f"{name}_json", tool.parameters)]

    def reads(self, reader: Reader, tools: Mapping[str, Tool]) -> Generator[None]:
        while not reader.text.strip() or "<|python_tag|>".startswith(reader.text.strip()):
            if reader.over:
                return
            yield
        more = yield from reader.skip(_BEGIN, 16)
        while more and (yield from json_call(reader, None, tools.__contains__)):
            yield from reader.skip(_CLOSE, 1)
            more = yield from reader.skip(_NEXT, 3)
        while True:  # what is no call is text
            reader.say(reader.text)
            reader.text = ""
            yield
