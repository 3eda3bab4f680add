"""Calls as Qwen 3 Coder and Qwen 3.5 write them: tags for the function and each parameter, texts without quotes."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping
from typing import Any

from longspec.calls.format import Format, Tool, literal, schema_rule
from longspec.calls.reader import Reader

__all__ = ["QwenXml"]

_FUNCTION = re.compile(r"\s*<function=")
_PARAMETER = re.compile(r"\s*<parameter=")


class QwenXml(Format):
    """`<tool_call><function=f><parameter=a>value</parameter></function></tool_call>`, each on a line of its own.

    A text stands as it is, any other value as JSON: what it was meant as is what its schema says, and where that says
    nothing, JSON if it can be.
    """

    mark = "<tool_call>"
    end = "</tool_call>"
    then = "\n"
    between = "\n<tool_call>\n"
    tokens = (mark, end)

    def is_of(self, template: str) -> bool:
        return self.mark in template and "<function=" in template

    def body(self, tool: Tool, name: str) -> list[str]:
        properties = tool.parameters.get("properties") or {}
        required = set(tool.parameters.get("required") or ())
        rules, parts = [], []
        for i, (key, schema) in enumerate(properties.items()):
            rule = f"{name}_p{i}"
            parts.append(f"{rule}" if key in required else f"{rule}?")
            rules += _parameter(rule, key, schema, tool.parameters)
        open_, close = literal(f"<function={tool.name}>\n"), literal(f"</function>\n{self.end}")
        return [f"{name}: {' '.join([open_, *parts, close])}", *rules]

    def reads(self, reader: Reader, tools: Mapping[str, Tool]) -> Generator[None]:
        while (yield from reader.say_until(self.mark)):
            if not (yield from reader.skip(_FUNCTION, len("<function="))):
                reader.say(self.mark)
                continue
            name = ((yield from reader.until(">")) or "").strip()
            schemas = tools[name].parameters.get("properties") or {} if name in tools else {}
            reader.begin(name)
            count = 0
            while (yield from reader.skip(_PARAMETER, len("<parameter="))):
                key = ((yield from reader.until(">")) or "").strip()
                value = yield from reader.until("</parameter>")
                if value is None:  # the answer was cut
                    return
                meant = _value(value.removeprefix("\n").removesuffix("\n"), schemas.get(key))
                reader.argue(f"{', ' if count else '{'}{json.dumps(key)}: {json.dumps(meant, ensure_ascii=False)}")
                count += 1
            reader.argue("}" if count else "{}")
            yield from reader.until(self.end)


def _parameter(rule: str, key: str, schema: Any, whole: Mapping[str, Any]) -> list[str]:
    """Rules of one parameter, with its tags."""
    head, tail = literal(f"<parameter={key}>\n"), literal("\n</parameter>\n")
    if _is_text(schema):
        if schema.get("enum") or "const" in schema:
            words = [literal(str(word)) for word in schema.get("enum") or [schema["const"]]]
            return [f"{rule}: {head} ({' | '.join(words)}) {tail}"]
        return [f"{rule}: {head} {rule}_text", f"{rule}_text[suffix={tail}]: /(?s:.*)/"]
    shared = {name: whole[name] for name in ("$defs", "definitions") if name in whole}
    schema = {**schema, **shared} if isinstance(schema, Mapping) else {}
    return [f"{rule}: {head} {rule}_json {tail}", schema_rule(f"{rule}_json", schema)]


def _is_text(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def _value(text: str, schema: Any) -> Any:
    if _is_text(schema):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
