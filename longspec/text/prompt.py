"""A prompt's token ids: a raw text's, or those of a conversation as the model's chat template writes it.

An answer that the model itself wrote keeps the tokens that it was written with: the same text may be spelled by others,
and a cache that holds the rows of these would be of no use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspec.errors import UsageError
from longspec.text.tokenizer import Vocabulary

__all__ = ["Prompt", "encode"]

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation: `{"role": ..., "content": ...}`.

An answer's message may have the `tokens` that the model itself wrote: they stand for its content where they spell it.
"""


def _encode_chat(
    vocabulary: Vocabulary, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> list[int]:
    """The template's rendering of the messages, with the answers' own tokens where they are the same text.

    They are that where the rendering holds the answer right behind what was rendered for it. A template that trims
    answers, or leaves out what was thought, gives another text: it is tokenised, from the last answer before it on.
    """
    bare = [{name: value for name, value in message.items() if name != "tokens"} for message in messages]
    text, tokens, done = vocabulary.chat(bare, **variables), list[int](), 0
    seams: list[tuple[int, int]] = []  # where an answer ends: in tokens, and in the text
    for i, message in enumerate(messages):
        own, content = message.get("tokens"), message.get("content")
        if not own or not isinstance(content, str) or not vocabulary.spells(own, content):
            continue
        try:
            before = vocabulary.chat(bare[:i], **variables)
        except UsageError:  # these messages alone aren't to its taste
            continue
        if len(before) > done and text.startswith(before + content):
            tokens += [*vocabulary.encode(text[done : len(before)], add_special=False), *own]
            seams.append((len(tokens), len(before) + len(content)))
            done = seams[-1][1]
    tokens += vocabulary.encode(text[done:], add_special=False)
    for at, offset in seams:
        piece = vocabulary.piece(tokens[at], first=False) if at < len(tokens) else None
        if piece is not None and not text[offset:].encode().startswith(piece):
            return vocabulary.encode(text, add_special=False)  # a tokenizer that puts a space before what it is given
    return tokens


def encode(
    vocabulary: Vocabulary,
    prompt: Prompt,
    system: str | None = None,
    *,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt's tokens, as `Engine.open` takes them; `variables` are for the chat template.

    Raises:
        UsageError: there is none, or the prompt isn't one text although it is raw.
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
