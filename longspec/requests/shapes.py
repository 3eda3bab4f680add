"""The shapes of requests: what OpenAI's chat and completions bodies may hold, checked by pydantic.

Takes parsed untrusted JSON; gives objects of these classes, or a RequestError that names the field, what it is and what
it must be. Types are strict: a number in quotes is no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from longspec.requests.fields import RequestError, shown

__all__ = [
    "MOST_BIASES",
    "MOST_MESSAGES",
    "Body",
    "Chat",
    "Completion",
    "Message",
    "ResponseFormat",
    "ToolCall",
    "checked",
]

MOST_BIASES = 1024
"""Of tokens whose logits a request changes."""

MOST_MESSAGES = 4096
"""Of a chat: a template's time grows with them, faster than that of their text."""

_Each = TypeVar("_Each", bound="Shape")
_WANTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "less_than": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}


def _content(value: object) -> str | None:
    """A message's text: its parts' texts without anything between them."""
    if value is None or isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [None]
    texts = [part["text"] for part in parts if isinstance(part, dict) and _is_text(part)]
    if len(texts) < len(parts):
        raise PydanticCustomError("wanted", "text, or a list of parts of type text")
    return "".join(texts)


def _is_text(part: dict[str, Any]) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def _prompts(value: object) -> tuple[str, ...]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise PydanticCustomError("wanted", "a text, or a list of texts")
    return tuple(prompts)


def _choice(value: object) -> str:
    """auto, none, required, or a tool's name."""
    if value in ("auto", "none", "required"):
        return str(value)
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise PydanticCustomError("wanted", "auto, none, required, or an object that names a function")
    return name


Whole = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Positive = Annotated[int, Field(ge=1, lt=1 << 63)]


class Shape(BaseModel):
    """An object of a body. Fields that aren't known here change no text."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class StreamOptions(Shape):
    include_usage: bool | None = None


class Function(Shape):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    type: Literal["function"]
    function: Function


class Called(Shape):
    name: str
    arguments: str


class ToolCall(Shape):
    id: str
    type: Literal["function"] = "function"
    function: Called


class Message(Shape):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, PlainValidator(_content)] = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Schema(Shape):
    given: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Shape):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None
    given: dict[str, Any] | None = Field(default=None, alias="schema")  # as llama.cpp's clients and instructor send it


class Drafting(Shape):
    """longspec's own field."""

    drafter: str | None = None


class Body(Shape):
    """What both kinds of requests may hold."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Positive = 1
    max_tokens: Whole | None = None
    logit_bias: dict[str, float] | None = None
    longspec: Drafting = Drafting()


class Completion(Body):
    logprobs: Whole | None = None
    prompt: Annotated[tuple[str, ...], PlainValidator(_prompts)] = Field(default=None, validate_default=True)


class Chat(Body):
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: Whole | None = None
    logprobs: bool = False
    top_logprobs: Whole | None = None
    reasoning_effort: str | None = None
    reasoning_budget: Whole | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[str, PlainValidator(_choice)] = "auto"
    parallel_tool_calls: bool = True


def checked(shape: type[_Each], body: Mapping[str, Any]) -> _Each:
    """The body as this shape.

    Raises:
        RequestError: a field isn't what it should be.
    """
    try:
        return shape.model_validate(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _refusal(error: ErrorDetails) -> RequestError:
    name = ""
    for part in error["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    value, kind, bounds = error["input"], error["type"], error.get("ctx", {})
    if kind == "missing":
        return RequestError(f"{name} is missing; give it.", param=name)
    if kind == "too_short":
        return RequestError(f"{name} is empty; give at least one.", param=name)
    if kind == "too_long":
        return RequestError(f"{name} has {len(value):,}; it may have {bounds['max_length']:,}.", param=name)
    wanted = _WANTED.get(kind, error["msg"])
    if kind == "greater_than_equal":
        wanted = "1 or more" if bounds["ge"] == 1 else "a whole number"
    elif kind == "literal_error":
        wanted = bounds["expected"].replace("'", "")
    return RequestError(f"{name} is {shown(value)}; it must be {wanted}.", param=name)
