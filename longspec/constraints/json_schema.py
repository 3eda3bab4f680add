"""A JSON schema as people write it: unwrapped, its keywords known, its integers bounded, and with something that fits.

Takes a decoded schema; gives one for llguidance, which ignores keywords that it doesn't know, lets an integer have
digits for ever, and finds nothing wrong with a schema that requires itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from longspec.errors import UsageError

__all__ = ["MOST_INTEGER", "prepared"]

MOST_INTEGER = 2**53 - 1
"""Of an integer without bounds of its own, as in RFC 8259: what every reader of JSON keeps exactly."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains",
           "propertyNames", "unevaluatedItems", "unevaluatedProperties", "contentSchema")  # fmt: skip
_OTHER = set(
    """
    $ref $schema $id id $anchor $dynamicRef $dynamicAnchor $vocabulary $comment title description default examples
    deprecated readOnly writeOnly type enum const minimum maximum exclusiveMinimum exclusiveMaximum multipleOf
    minLength maxLength pattern format minItems maxItems uniqueItems minContains maxContains required minProperties
    maxProperties dependentRequired dependencies contentEncoding contentMediaType
    """.split()  # noqa: SIM905 - a list would be as many lines as words
)
_KEYWORDS = {*_NAMED, *_LISTED, *_SINGLE, *_OTHER}
_SILENT = set(
    """
    $schema $id id $anchor $dynamicAnchor $vocabulary $comment $defs definitions title description default examples
    deprecated readOnly writeOnly contentEncoding contentMediaType contentSchema
    """.split()  # noqa: SIM905 - as above
)
"""Keywords that hold no value to anything: notes, and schemas that others refer to."""
_WRAPPER = {"name", "strict", "schema", "description"}
_LEAST = ("minimum", "exclusiveMinimum")
_MOST = ("maximum", "exclusiveMaximum")


def prepared(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema to be compiled. OpenAI's `{"name", "strict", "schema"}` is unwrapped.

    Raises:
        UsageError: it has no keyword but notes, or no known one, or one that looks misspelt; or it requires itself, or
        is nested too deeply.
    """
    try:
        return _prepared(schema)
    except RecursionError:
        raise UsageError("The JSON schema is nested too deeply; make it flatter.") from None


def _prepared(schema: dict[str, Any]) -> dict[str, Any]:
    inner = schema.get("json_schema")
    if schema.get("type") == "json_schema" and isinstance(inner, dict):
        schema = inner
    if isinstance(schema.get("schema"), dict) and schema.keys() <= _WRAPPER:
        schema = schema["schema"]
    found = list(_within(schema))
    for each in found:
        _check(each)
    if not schema.keys() & _KEYWORDS - _SILENT:
        raise UsageError(
            "The JSON schema has no keyword that a value is held to, so it would hold an answer to nothing; give it a "
            'type or properties, or {"type": "object"} for any JSON object.'
        )
    if _requires_itself(schema):
        raise UsageError("The JSON schema can't be used: nothing fits it, as it requires itself without an end.")
    return _bounded(schema) if all(map(_is_small, found)) else schema


def _within(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and those in it; properties that have a keyword's name aren't taken for one."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name in _NAMED:
        for each in schema[name].values() if isinstance(schema.get(name), dict) else ():
            yield from _within(each)
    for name in _LISTED:
        for each in schema[name] if isinstance(schema.get(name), list) else ():
            yield from _within(each)
    for name in _SINGLE:
        yield from _within(schema.get(name))


def _check(schema: dict[str, Any]) -> None:
    unknown = sorted(name for name in schema if name not in _KEYWORDS and name != "x-guidance")
    for name in unknown:
        near = get_close_matches(name, _KEYWORDS, 1, 0.75)
        if near and near[0] not in schema:
            raise UsageError(f"The JSON schema has {name}, which is no keyword of JSON Schema; write {near[0]}.")
    if unknown and not schema.keys() & _KEYWORDS:
        raise UsageError(
            f"The JSON schema has {', '.join(unknown[:5])}, and no keyword of JSON Schema, so it would hold an answer "
            "to nothing; give it a type or properties."
        )


def _is_small(schema: dict[str, Any]) -> bool:
    """Whether its numbers leave room for the bounds of integers."""
    bounds = [schema.get(name) for name in (*_LEAST, *_MOST)]
    return all(abs(bound) < MOST_INTEGER for bound in bounds if isinstance(bound, int | float))


def _bounded(schema: Any) -> Any:
    """The schema with bounds for its integers that have none."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for name in _NAMED:
        if isinstance(made.get(name), dict):
            made[name] = {key: _bounded(each) for key, each in made[name].items()}
    for name in _LISTED:
        if isinstance(made.get(name), list):
            made[name] = [_bounded(each) for each in made[name]]
    for name in _SINGLE:
        if isinstance(made.get(name), dict):
            made[name] = _bounded(made[name])
    kinds = made.get("type")
    if "integer" in (kinds if isinstance(kinds, list) else [kinds]) and not made.keys() & {"enum", "const"}:
        if not made.keys() & set(_LEAST):
            made["minimum"] = -MOST_INTEGER
        if not made.keys() & set(_MOST):
            made["maximum"] = MOST_INTEGER
    return made


def _requires_itself(schema: dict[str, Any], most: int = 10_000) -> bool:
    """Whether every value that fits holds one that fits, without an end; no where it isn't found in `most` steps."""
    steps = 0

    def endless(each: Any, open_: frozenset[str]) -> bool:  # open_: the references on the way here
        nonlocal steps
        steps += 1
        if not isinstance(each, dict) or steps > most:
            return False
        reference = each.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            return reference in open_ or endless(_at(schema, reference), open_ | {reference})
        if any(endless(part, open_) for part in _needed(each)):
            return True
        choices = _list(each.get("anyOf")) or _list(each.get("oneOf"))
        return bool(choices) and all(endless(choice, open_) for choice in choices)

    return endless(schema, frozenset({"#"}))


def _needed(schema: dict[str, Any]) -> list[Any]:
    """The schemas that any value has to fit, or a part of it."""
    found = list(_list(schema.get("allOf")))
    properties = schema.get("properties")
    if isinstance(properties, dict) and schema.get("type") == "object":
        found += [properties.get(name) for name in _list(schema.get("required")) if isinstance(name, str)]
    least = schema.get("minItems")
    if schema.get("type") == "array" and isinstance(least, int) and least > 0 and "prefixItems" not in schema:
        found.append(schema.get("items"))
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _at(root: dict[str, Any], reference: str) -> Any:
    """What a reference within the document names; None if there is nothing."""
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found
