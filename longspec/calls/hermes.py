"""Calls as Hermes 2, Qwen 2.5 and Qwen 3 write them: JSON between <tool_call> and </tool_call>."""

from __future__ import annotations

from collections.abc import Generator, Mapping

from longspec.calls.format import Format, Tool, literal, schema_rule
from longspec.calls.reader import Reader, json_call

__all__ = ["Hermes"]


class Hermes(Format):
    """`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, each on a line of its own."""

    mark = "<tool_call>"
    end = "</tool_call>"
    then = "\n"
    between = "\n<tool_call>\n"
    tokens = (mark, end)

    def is_of(self, template: str) -> bool:
        return self.mark in template

    def body(self, tool: Tool, name: str) -> list[str]:
        head = literal(f'{{"name": {literal(tool.name)}, "arguments": ')
        tail = literal("}\n" + self.end)
        return [f"{name}: {head} {name}_json {tail}", schema_rule(f"{name}_json", tool.parameters)]

    def reads(self, reader: Reader, tools: Mapping[str, Tool]) -> Generator[None]:
        while (yield from reader.say_until(self.mark)):
            if not (yield from json_call(reader, self.end, lambda name: True)):
                reader.say(self.mark)
                continue
            yield from reader.until(self.end)
