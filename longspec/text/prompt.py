"""Encoding of prompts: raw text, or a conversation rendered by the model's chat template.

An answer that the model generated keeps its tokens: retokenizing its text may give others, for which the KV cache of
the generated ones couldn't be reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspec.errors import UsageError
from longspec.text.tokenizer import Vocabulary

__all__ = ["Prompt", "encode"]

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation: `{"role": ..., "content": ...}`.

An assistant message may have the `tokens` that the model generated: they are used if they decode to its content.
"""


def _encode_chat(
    vocabulary: Vocabulary, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> list[int]:
    """Tokens of the rendered messages, with the generated tokens of answers where the rendering contains their text.

    An answer's tokens are used if the rendering begins with the rendering of the messages before it, followed by the
    answer. A template that trims answers, or leaves out reasoning, renders another text, which is tokenized.
    """
    bare = [{name: value for name, value in message.items() if name != "tokens"} for message in messages]
    text, tokens, done = vocabulary.chat(bare, **variables), list[int](), 0
    seams: list[tuple[int, int]] = []  # ends of answers: index in tokens, offset in the text
    for i, message in enumerate(messages):
        own, content = message.get("tokens"), message.get("content")
        if not own or not isinstance(content, str) or not vocabulary.spells(own, content):
            continue
        try:
            before = vocabulary.chat(bare[:i], **variables)
        except UsageError:  # the template refuses this prefix of the conversation
            continue
        if len(before) > done and text.startswith(before + content):
            tokens += [*vocabulary.encode(text[done : len(before)], add_special=False), *own]
            seams.append((len(tokens), len(before) + len(content)))
            done = seams[-1][1]
    tokens += vocabulary.encode(text[done:], add_special=False)
    for at, offset in seams:
        piece = vocabulary.piece(tokens[at], first=False) if at < len(tokens) else None
        if piece is not None and not text[offset:].encode().startswith(piece):
            return vocabulary.encode(text, add_special=False)  # this tokenizer puts a space before each encoded text
    return tokens


def encode(
    vocabulary: Vocabulary,
    prompt: Prompt,
    system: str | None = None,
    *,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Tokens of a prompt, with the arguments of `Engine.open`; `variables` are passed to the chat template.

    Raises:
        UsageError: the prompt is empty, there is no chat template, or a raw prompt isn't a single text.
    """
    if raw:
        if not isinstance(prompt, str) or system:
            raise UsageError("A raw prompt is one text, without a system message or roles.")
        if variables:
            raise UsageError("A raw prompt has no chat template that an effort could be told; leave it or --raw out.")
        tokens = vocabulary.encode(prompt, add_special=True)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        tokens = _encode_chat(vocabulary, messages, variables or {})
    if not tokens:
        raise UsageError("The prompt is empty; give at least one token to go on from.")
    return tokens
