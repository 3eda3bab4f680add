"""Calls as Gemma 4 writes them: names without quotes, and texts between marks of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping
from typing import Any

from longspec.calls.format import Format, Tool, literal
from longspec.calls.reader import Reader

__all__ = ["Gemma"]

_QUOTE = '<|"|>'
_MOST_DEPTH = 32
_KEY = re.compile(r"[^:{}\[\],]+")
_BARE = re.compile(r"[^:{}\[\],]+")


class Gemma(Format):
    """`<|tool_call>call:f{city:<|"|>Rome<|"|>,days:2}<tool_call|>`, again for each call."""

    mark = "<|tool_call>"
    end = "<tool_call|>"
    between = mark
    tokens = (mark, end, _QUOTE)

    def is_of(self, template: str) -> bool:
        return self.mark in template and "call:" in template

    def body(self, tool: Tool, name: str) -> list[str]:
        rules: list[str] = []
        whole = _rule(f"{name}_v", tool.parameters, tool.parameters, rules, 0)
        return [f"{name}: {literal(f'call:{tool.name}')} {whole} {literal(self.end)}", *rules]

    def reads(self, reader: Reader, tools: Mapping[str, Tool]) -> Generator[None]:
        while (yield from reader.say_until(self.mark)):
            body = yield from _until_end(reader, self.end)
            name, brace, rest = body.partition("{")
            if not name.strip().startswith("call:") or not brace:
                reader.say(self.mark + body)
                continue
            reader.begin(name.strip().removeprefix("call:"))
            reader.argue(_arguments(brace + rest))


def _until_end(reader: Reader, end: str) -> Generator[None, None, str]:
    """A call's text up to its end, which is passed, or the answer's."""
    while (at := reader.text.find(end)) < 0 and not reader.over:
        yield
    body, _, reader.text = reader.text.partition(end) if at >= 0 else (reader.text, "", "")
    return body


def _arguments(text: str) -> str:
    """The JSON of what is written; of a call that was cut, what was written up to there."""
    try:
        value, _ = _value(text, 0, 0)
    except (ValueError, IndexError):
        return _cut(text)
    return json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    """A call's text that doesn't end, in JSON's spelling, for what it is worth."""
    pieces = text.split(_QUOTE)
    made = [json.dumps(piece, ensure_ascii=False) if i % 2 else _named(piece) for i, piece in enumerate(pieces)]
    if len(pieces) % 2 == 0:  # the last text is open
        made[-1] = made[-1][:-1]
    return "".join(made)


def _named(text: str) -> str:
    return re.sub(r"([^:{}\[\],\s]+):", lambda key: f'"{key[1]}": ', text).replace(",", ", ")


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends. Raises ValueError or IndexError where there is none."""
    if depth > _MOST_DEPTH:
        raise ValueError(depth)
    if text.startswith(_QUOTE, at):
        end = text.index(_QUOTE, at + len(_QUOTE))
        return text[at + len(_QUOTE) : end], end + len(_QUOTE)
    if text[at] == "[":
        items: list[Any] = []
        at += 1
        while text[at] != "]":
            item, at = _value(text, at, depth + 1)
            items.append(item)
            at += text[at] == ","
        return items, at + 1
    if text[at] == "{":
        made: dict[str, Any] = {}
        at += 1
        while text[at] != "}":
            if text.startswith(_QUOTE, at):
                key, at = _value(text, at, depth + 1)
            else:
                match = _KEY.match(text, at)
                if match is None:
                    raise ValueError(at)
                key, at = match[0].strip(), match.end()
            if text[at] != ":":
                raise ValueError(at)
            made[key], at = _value(text, at + 1, depth + 1)
            at += text[at] == ","
        return made, at + 1
    match = _BARE.match(text, at)
    if match is None:
        raise ValueError(at)
    try:
        return json.loads(match[0]), match.end()
    except ValueError:
        return match[0].strip(), match.end()


def _rule(name: str, schema: Any, whole: Mapping[str, Any], rules: list[str], depth: int) -> str:
    """The name of a rule for a schema's values, which is added to `rules`. What isn't said more closely may be any
    text, number, flag or null.
    """
    schema = _resolved(schema, whole)
    if depth > _MOST_DEPTH:
        schema = {}
    if options := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        rules.append(f"{name}: {' | '.join(literal(_spelled(option)) for option in options)}")
        return name
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        _object(name, schema, whole, rules, depth)
    elif kind == "array":
        item = _rule(f"{name}_i", schema.get("items", {}), whole, rules, depth + 1)
        rules.append(f'{name}: "[" ({item} ("," {item})*)? "]"')
    else:
        text = f"{literal(_QUOTE)} {name}_t"
        numbers = {"integer": r"/-?(0|[1-9][0-9]{0,17})/", "number": r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?/"}
        plain = {"string": text, "boolean": '"true" | "false"', "null": '"null"', **numbers}
        kinds = kind if isinstance(kind, list) else [kind] if kind in plain else [*plain]
        rules.append(f"{name}: {' | '.join(plain[each] for each in kinds if each in plain)}")
        if "string" in kinds:
            rules.append(f"{name}_t[suffix={literal(_QUOTE)}]: /(?s:.*)/")
    return name


def _object(name: str, schema: Mapping[str, Any], whole: Mapping[str, Any], rules: list[str], depth: int) -> None:
    """What is required in its order, and then what isn't; without properties nothing."""
    properties, needed = schema.get("properties") or {}, set(schema.get("required") or ())
    parts: list[tuple[str, bool]] = []
    for key in sorted(properties, key=lambda key: key not in needed):
        value = _rule(f"{name}_{len(parts)}", properties[key], whole, rules, depth + 1)
        parts.append((f"{literal(f'{key}:')} {value}", key in needed))
    must = [part for part, is_needed in parts if is_needed]
    may = [part for part, is_needed in parts if not is_needed]
    behind = [f' ("," {part})?' for part in may]
    if must:
        inner = ' "," '.join(must) + "".join(behind)
    else:  # begun by any of them
        inner = " | ".join(part + "".join(behind[i + 1 :]) for i, part in enumerate(may))
        inner = f"({inner})?" if may else ""
    rules.append(f'{name}: "{{" {inner} "}}"')


def _resolved(schema: Any, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, or the one that its reference names among the definitions."""
    for _ in range(_MOST_DEPTH):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        at: Any = whole
        for part in reference.removeprefix("#/").split("/"):
            at = at.get(part, {}) if isinstance(at, Mapping) else {}
        schema = at
    return {}


def _spelled(value: Any) -> str:
    return f"{_QUOTE}{value}{_QUOTE}" if isinstance(value, str) else json.dumps(value)
