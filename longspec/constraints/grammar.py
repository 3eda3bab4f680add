"""A JSON schema or a regular expression as a checked grammar for constrained decoding.

Takes the user's schema or expression and gives llguidance's grammar string; knows no model and no tokens, so that an
error is reported before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from longspec.constraints.json_schema import prepared
from longspec.errors import UsageError
from longspec.machine.files import read_bytes

__all__ = ["LIMITS", "MOST_BYTES", "checked", "grammar_of", "schema_text", "too_large"]

MOST_BYTES = 1 << 20
"""Of a schema or an expression: a stranger's file is not read further."""

LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=100_000)
"""The library's own bounds on grammar, lexer and parser, with a tenth of its work ahead: `(a{1000}){1000}` took nine
seconds. The text that was written is kept out of its errors.
"""

_TRIED = 64  # bytes of a text that are tried of each grammar: a millisecond, and 0.2 s of b{20000}
_QUOTE = ord('"')

# One spelling, that of json.dumps. With free white space a small model could write blanks for ever, and no token
# between two values would be forced.
_SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_of(
    json_schema: str | Path | Mapping[str, Any] | type | None = None, regex: str | None = None
) -> str | None:
    """The grammar of a schema (as `schema_text` takes it) or of an expression; None for neither.

    Raises:
        UsageError: both are given, one is too large, it can't be read or compiled, or nothing fits it.
    """
    if json_schema is None and regex is None:
        return None
    if json_schema is not None and regex is not None:
        raise UsageError("A JSON schema and a regular expression are both given; an answer is held to one of them.")
    if regex is not None:
        if len(regex) > MOST_BYTES:
            raise UsageError(f"The regular expression has {len(regex):,} characters; at most {MOST_BYTES:,} are read.")
        return checked(LLMatcher.grammar_from_regex(regex), "The regular expression")
    assert json_schema is not None
    text = schema_text(json_schema)
    if len(text.encode(errors="replace")) > MOST_BYTES:
        raise UsageError(f"The JSON schema is larger than the {MOST_BYTES:,} bytes that are read; make it smaller.")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The JSON schema is not JSON ({_reason(str(error))}).") from None
    if not isinstance(schema, dict):
        raise UsageError("The JSON schema is not a JSON object; write it in braces.")
    schema.pop("x-guidance", None)  # llguidance's switches, which an untrusted schema must not set
    try:
        text = json.dumps(prepared(schema))
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=_SPELLING)  # type: ignore[arg-type]
    except RecursionError:
        raise UsageError("The JSON schema is nested too deeply; make it flatter.") from None
    except ValueError as error:
        raise UsageError(f"The JSON schema can't be used: {_reason(str(error))}.") from None
    return checked(grammar, "The JSON schema")


def schema_text(json_schema: str | Path | Mapping[str, Any] | type) -> str:
    """The JSON of a schema: of a dict, JSON, the name of a file with JSON, or a pydantic class. A string that begins
    with a brace is JSON, any other one a file name. Raises UsageError where it can't be read, or the class is none.
    """
    if isinstance(json_schema, type):
        if not hasattr(json_schema, "model_json_schema"):
            raise UsageError(f"{json_schema.__name__} is no pydantic class (a BaseModel); give one, or a JSON schema.")
        return json.dumps(json_schema.model_json_schema())
    if not isinstance(json_schema, str | Path):
        return json.dumps(dict(json_schema))
    if isinstance(json_schema, Path) or not json_schema.lstrip().startswith("{"):
        return _read(Path(json_schema))
    return json_schema


def _read(path: Path) -> str:
    data = read_bytes(path, MOST_BYTES, "The JSON schema", pipe=True)
    try:
        return data.decode("utf-8-sig")
    except ValueError:
        raise UsageError(f"The JSON schema {path} isn't UTF-8 text; give a file of JSON, or JSON itself.") from None


def checked(grammar: str, what: str = "What the tools take") -> str:
    """The grammar, in llguidance's JSON or its Lark. Raises UsageError where it can't be compiled."""
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    if wrong:
        raise UsageError(f"{what} can't be used: {_reason(messages[0])}.")
    matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
        gave_up = matcher.is_error() and not matcher.get_error().startswith("NoExtension")
        if matcher.is_stopped() and not gave_up and not matcher.is_accepting():
            raise UsageError(f"{what} can't be used: nothing fits it.")
        _try(matcher)
    if matcher.is_error() and not matcher.get_error().startswith("NoExtension"):
        raise UsageError(f"{what} can't be used: it is {too_large(matcher.get_error())}.")
    return grammar


def _try(matcher: LLMatcher) -> None:
    """Write a text's first bytes: what a repetition needs is only built, and may only pass a limit, where it begins.
    A quotation mark is preferred, since it leads into a string and out of it.
    """
    for _ in range(_TRIED):
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")[:256]
        if matcher.is_stopped() or not allowed.any():
            return
        if not matcher.try_consume_tokens([_QUOTE if allowed[_QUOTE] else int(allowed.argmax())]):
            return


def too_large(message: str) -> str:
    """What is wrong with a grammar where llguidance's matcher gives up, by its message: the end of a sentence."""
    return (
        f"too large for its compiler's limits ({_reason(message)}); make it smaller, as by fewer or shorter repetitions"
    )


@cache
def _bytes() -> LLTokenizer:
    """A vocabulary of the 256 bytes, over which a grammar is tried before a model is there."""
    return LLTokenizer("byte")


def _reason(message: str) -> str:
    """One line of llguidance's message: for a regular expression the cause; its other lines show the place."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason is given"]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return reason.rstrip(".")
