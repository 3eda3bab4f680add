"""Calls as gpt-oss writes them, in harmony: messages to `functions.NAME`, on a channel of their own."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping

from longspec.calls.format import Format, Tool, literal, schema_rule
from longspec.calls.reader import Reader

__all__ = ["Harmony"]

_START, _CHANNEL, _MESSAGE = "<|start|>assistant", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_TO = re.compile(r"\bto=functions\.([\w.-]+)")
_MOST = 400  # characters of a message's head


class Harmony(Format):
    """`<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}`, in which the recipient may stand before
    the channel too. Other messages of the answer are text, without their heads.
    """

    mark = f"{_CHANNEL}commentary to=functions."
    between = f"<|end|>{_START}{mark}"
    lead = f"{_CHANNEL}final{_MESSAGE}"
    tokens = ("<|start|>", _CHANNEL, _MESSAGE, "<|constrain|>", "<|end|>")

    def is_of(self, template: str) -> bool:
        return "functions." in template and f"{_CHANNEL}commentary" in template

    def body(self, tool: Tool, name: str) -> list[str]:
        head = literal(f"{tool.name} <|constrain|>json{_MESSAGE}")
        return [f"{name}: {head} {name}_json", schema_rule(f"{name}_json", tool.parameters)]

    def reads(self, reader: Reader, tools: Mapping[str, Tool]) -> Generator[None]:
        while True:
            head = yield from _head(reader)
            called = None if head is None else _TO.search(head)
            if called is not None:
                reader.begin(called[1])
                yield from reader.object()
                yield from _skip_end(reader)
            elif not (yield from _body(reader)):
                return


def _head(reader: Reader) -> Generator[None, None, str | None]:
    """Pass a message's head; None where the text begins with none."""
    while True:
        text = reader.text.lstrip()
        begun = any(text.startswith(each) or each.startswith(text) for each in (_START, _CHANNEL, "to=functions."))
        if not begun:
            return None
        head, found, rest = reader.text.partition(_MESSAGE)
        if found:
            reader.text = rest
            return head
        if reader.over or len(reader.text) > _MOST:
            return None
        yield


def _body(reader: Reader) -> Generator[None, None, bool]:
    """Say a message's text up to its end, or the next message; whether there is one. Blanks there aren't said."""
    marks = (*_ENDS, _START, _CHANNEL)
    while True:  # what begins as a head here is none
        found = [(at, mark) for mark in marks if (at := reader.text.find(mark, int(mark not in _ENDS))) >= 0]
        if found:
            at, mark = min(found)
            reader.say(reader.text[:at].rstrip())
            reader.text = reader.text[at + (len(mark) if mark in _ENDS else 0) :]
            return True
        if reader.over:
            return False
        sizes = range(min(len(_START), len(reader.text)), 0, -1)
        held = next((n for n in sizes if any(mark.startswith(reader.text[-n:]) for mark in marks)), 0)
        final = reader.text[: len(reader.text) - held].rstrip()
        reader.say(final)
        reader.text = reader.text[len(final) :]
        yield


def _skip_end(reader: Reader) -> Generator[None]:
    """Pass what ends a call."""
    while not reader.over and any(end.startswith(reader.text) and end != reader.text for end in _ENDS):
        yield
    for end in _ENDS:
        reader.text = reader.text.removeprefix(end)
