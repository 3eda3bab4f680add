"""Encoding of prompts: raw text, or a conversation rendered by the model's chat template.

An answer that the model generated keeps its tokens: retokenizing its text may give others, for which the KV cache of
the generated ones couldn't be reused. Nothing that a message holds can be a special token: the turns of a conversation
are the template's.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeGuard

from longspec.errors import UsageError
from longspec.machine.declared import hold, kind_of
from longspec.machine.schema import Kind, shown
from longspec.text.contents import rendered
from longspec.text.limits import TemplateLimitError
from longspec.text.tokenizer import Vocabulary

__all__ = ["Prompt", "encode"]

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation: `{"role": ..., "content": ...}`.

An assistant message may have the `tokens` that the model generated: they are used if they decode to its content.
"""

ROLES = ("user", "system", "assistant", "tool", "developer")
"""What every conversation may hold; a chat template may name further roles."""

_PROMPT = Kind('a text, or a list of messages ({"role": "user", "content": "Hi."})', kind_of(Prompt).holds)
_CONTENT = kind_of(str | Sequence[Mapping[str, Any]] | None)


def _encode_chat(
    vocabulary: Vocabulary,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    allow_special: bool,
    room: int | None,
) -> list[int]:
    """Tokens of the rendered messages, with the generated tokens of answers where the rendering contains their text.

    An answer's tokens are used if the rendering begins with the rendering of the messages before it, followed by the
    answer. A template that trims answers, or leaves out reasoning, renders another text, which is tokenized.
    """
    bare = _bare(messages)
    text, cuts = (vocabulary.chat(bare, **variables), []) if allow_special else rendered(vocabulary, bare, variables)
    vocabulary.check_length(text, room)

    def part(start: int, end: int | None = None) -> list[int]:
        inside = cuts[bisect_left(cuts, start) :]
        return vocabulary.encode_chat(text[start:end], [cut - start for cut in inside])

    tokens, done = list[int](), 0
    seams: list[tuple[int, int]] = []  # ends of answers: index in tokens, offset in the text
    for i, message in enumerate(messages):
        own, content = message.get("tokens"), message.get("content")
        if not _are_tokens(own) or not isinstance(content, str) or not vocabulary.spells(own, content):
            continue
        if not allow_special and vocabulary.has_special(own):  # they spell nothing, so the text doesn't tell of them
            continue
        try:
            before = vocabulary.chat(bare[:i], **variables)
        except UsageError:  # the template refuses this prefix of the conversation
            continue
        if len(before) > done and text.startswith(before + content):
            tokens += [*part(done, len(before)), *own]
            seams.append((len(tokens), len(before) + len(content)))
            done = seams[-1][1]
    tokens += part(done)
    for at, offset in seams:
        piece = vocabulary.piece(tokens[at], first=False) if at < len(tokens) else None
        if piece is not None and not text[offset:].encode().startswith(piece):
            return part(0)  # this tokenizer puts a space before each encoded text
    return tokens


def _are_tokens(own: object) -> TypeGuard[list[int]]:
    return isinstance(own, list) and bool(own) and all(type(token) is int and 0 <= token < 1 << 31 for token in own)


def _accepted(
    vocabulary: Vocabulary, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> Sequence[Mapping[str, Any]]:
    """The messages; if the template refuses them with a system message, its text before that of the first user."""
    pair = messages[:2]
    texts = [message.get("content") for message in pair]
    if [message.get("role") for message in pair] != ["system", "user"] or not all(isinstance(t, str) for t in texts):
        return messages
    joined = [{**pair[1], "content": "\n\n".join(map(str, texts))}, *messages[2:]]
    try:
        vocabulary.chat(_bare(messages), **variables)
    except TemplateLimitError:
        raise
    except UsageError:
        with suppress(UsageError):
            vocabulary.chat(_bare(joined), **variables)
            return joined
    return messages


def _bare(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without the tokens of answers, which no template knows."""
    return [{name: value for name, value in message.items() if name != "tokens"} for message in messages]


def _begun(vocabulary: Vocabulary, tokens: list[int]) -> list[int]:
    """The tokens of a chat, with the BOS token where the vocabulary asks for it and the template doesn't write it."""
    bos = vocabulary.id_of("bos_token") if vocabulary.begins else None
    return tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]


def _check(vocabulary: Vocabulary, prompt: Prompt, *, raw: bool) -> None:
    """Raise UsageError where it isn't a prompt, or has nothing to answer. A raw one may begin with the BOS token."""
    hold("The prompt", prompt, _PROMPT)
    if isinstance(prompt, str):
        if not (raw or prompt.strip()):
            raise UsageError("The prompt is empty; give a text to answer.")
        return
    if not len(prompt):
        raise UsageError("The prompt has no message; give one at least.")
    roles = {*ROLES, *(named[1] for named in re.finditer(r"""(?=["']([\w-]+)["'])""", vocabulary.template or ""))}
    for message in prompt:
        role = message.get("role")
        if not isinstance(role, str) or role not in roles:
            raise UsageError(f"A message's role is {shown(role)}; it must be {', '.join(ROLES[:-1])} or {ROLES[-1]}.")
        hold("A message's content", message.get("content"), _CONTENT)


def encode(
    vocabulary: Vocabulary,
    prompt: Prompt,
    system: str | None = None,
    *,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    allow_special: bool = False,
    room: int | None = None,
) -> list[int]:
    """Tokens of a prompt, with the arguments of `Engine.open`; `variables` are passed to the chat template.

    What messages hold is plain text: only what the chat template writes can be a special token, unless `allow_special`.
    A raw prompt is all that the model sees, and its special tokens are read. A template that refuses a system message
    gets its text before the first user's. A text that must have more tokens than `room` isn't tokenized.

    Raises:
        ContextError: it is such a text.
        UsageError: the prompt is empty, there is no chat template, or a raw prompt isn't a single text.
    """
    _check(vocabulary, prompt, raw=raw)
    if raw:
        if not isinstance(prompt, str) or system:
            raise UsageError("A raw prompt is one text, without a system message or roles.")
        if variables:
            raise UsageError("A raw prompt has no chat template that an effort could be told; leave it or --raw out.")
        vocabulary.check_length(prompt, room)
        tokens = vocabulary.encode(prompt, add_special=True)
    else:
        messages: Sequence[Mapping[str, Any]] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        )
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        accepted = _accepted(vocabulary, messages, variables or {})
        tokens = _begun(vocabulary, _encode_chat(vocabulary, accepted, variables or {}, allow_special, room))
    if not tokens:
        raise UsageError(
            "The prompt is empty, and this model begins no text with a token of its own; give a text to go on from."
        )
    return tokens
