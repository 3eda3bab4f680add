"""Where the contents of messages and tools stand in a rendered chat, so that no text in them can be a special token.

Takes a vocabulary with its template, messages, and tools among the template's variables; gives the rendered text, and
offsets over which no special token may lie. They are found by rendering the messages again with a mark in them, a
letter that nothing else has: in front of and behind each content, and after every letter with which a special token
could begin. Where the template then writes another text, as one does that looks for `</think>` in answers, only the
special tokens themselves are marked; where that changes the text too, they are refused.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from longspec.errors import UsageError
from longspec.text.tokenizer import Vocabulary

__all__ = ["rendered"]

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
"""A role that is a name is the template's word; any other is content."""

_MARKS = range(0xF0001, 0xFFFFE)  # a plane for private use

Mark = Callable[[str, bool], str]
"""From a text, and whether it is the assistant's, to the text with marks inside."""


def rendered(
    vocabulary: Vocabulary, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> tuple[str, list[int]]:
    """The chat of these messages, and the ascending offsets over which no special token may lie.

    Raises:
        UsageError: the template fails, or messages or tools hold special tokens that can't be told from the template's.
    """
    text = vocabulary.chat(messages, **variables)
    tools = {name: value for name, value in variables.items() if name == "tools"}  # the others are the engine's words
    mark = _unused(text, [*messages, tools])

    def cuts(marking: Mark, edge: str) -> list[int] | None:
        """The offsets of the marks; None where they change the text."""
        told = {**variables, **{name: _walked(value, marking) for name, value in tools.items()}}
        try:
            marked = vocabulary.chat(_marked(messages, marking, edge), **told)
        except UsageError:
            return None
        pieces = marked.split(mark)
        return list(accumulate(map(len, pieces[:-1]))) if "".join(pieces) == text else None

    found = cuts(_after(vocabulary.first_letters, mark), mark)
    if found is not None:
        return text, found
    inside = _inside(vocabulary.special_in(text), vocabulary, mark)
    for edge in (mark, ""):
        found = cuts(inside, edge)
        if found is not None:
            return text, found
    held = [*messages, tools]
    if _marked(held, inside) != _marked(held, lambda one, _: one):
        raise UsageError(
            "A message or a tool holds the name of a special token, and the model's chat template changes it so that "
            "it can't be told from the template's own; leave it out, or allow it (--allow-special-tokens)."
        )
    return text, []


def _after(letters: Collection[str], mark: str) -> Mark:
    """Marks after each of these letters: whatever special token a template makes of the text, a mark is in it."""
    if not letters:
        return lambda text, _: text
    firsts = re.compile(f"[{''.join(map(re.escape, sorted(letters)))}]")
    return lambda text, _: firsts.sub(lambda found: found[0] + mark, text)


def _inside(names: Collection[str], vocabulary: Vocabulary, mark: str) -> Mark:
    """Marks inside the names of special tokens; an answer's reasoning markers stay what they are."""
    markers = vocabulary.markers
    own = set() if markers is None else {markers.begin, markers.end}
    longest = sorted(names, key=len, reverse=True)

    def marking(text: str, is_answer: bool) -> str:
        for name in longest:
            if not (is_answer and name in own):
                text = text.replace(name, name[0] + mark + name[1:])
        return text

    return marking


def _marked(messages: Sequence[Mapping[str, Any]], marking: Mark, edge: str = "") -> list[Any]:
    """The messages with marks in their texts, and with `edge` at both ends of each."""

    def message(fields: Mapping[str, Any]) -> dict[str, Any]:
        role = fields.get("role")
        named = {"role"} if isinstance(role, str) and _ROLE.fullmatch(role) else set()
        own = role == "assistant"
        return {
            marking(name, own): value if name in named else _walked(value, marking, edge, own)
            for name, value in fields.items()
        }

    return [message(fields) for fields in messages]


def _walked(value: Any, marking: Mark, edge: str = "", own: bool = False) -> Any:
    """A value with marks in all its texts; names of fields get no `edge`, so that the template finds them."""
    if isinstance(value, str):
        return _edged(marking(value, own), edge)
    if isinstance(value, Mapping):
        return {marking(name, own): _walked(each, marking, edge, own) for name, each in value.items()}
    return [_walked(each, marking, edge, own) for each in value] if isinstance(value, list | tuple) else value


def _edged(text: str, mark: str) -> str:
    """The text with a mark at both ends, inside its blanks: a template that trims it finds those as before."""
    core = text.strip()
    if not core:
        return text
    at = text.index(core)
    return text[:at] + mark + core + mark + text[at + len(core) :]


def _unused(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """A letter that neither the text nor the messages have."""
    texts = [text]

    def noted(one: str, _: bool) -> str:
        texts.append(one)
        return one

    _marked(messages, noted)
    for _ in range(8):
        mark = chr(secrets.choice(_MARKS))
        if not any(mark in one for one in texts):
            return mark
    taken = set[str]().union(*texts)  # slower, and sure
    return next(chr(code) for code in _MARKS if chr(code) not in taken)
