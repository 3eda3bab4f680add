"""A checkpoint's vocabulary: from text to token ids, and from a token to its bytes.

Takes a tokenizer, a chat template and special tokens as plain values; knows no model, no file and no session.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from longspec.errors import ModelError, UsageError
from longspec.text.chat_template import ChatTemplate
from longspec.text.think_tags import find

__all__ = ["Vocabulary"]


# GPT-2's byte alphabet: a printable byte stands for itself, the others are mapped to 256, 257, ... in order.
_PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = sorted({*range(256)} - {*_PRINTS})
_SPELLED = {chr(byte): byte for byte in _PRINTS} | {chr(256 + i): byte for i, byte in enumerate(_MOVED)}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """A checkpoint's tokenizer, with its chat template and its special tokens (`{"bos_token": "<s>", ...}`).

    A special token is a string, or a mapping with its `content`, as in tokenizer_config.json. The vocabulary takes over
    the tokenizer, and switches off truncation and padding that its file may set.

    Raises:
        ModelError: a special token is neither.
    """

    def __init__(
        self, tokenizer: Tokenizer, special: Mapping[str, object] | None = None, template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.special = {role: _content(role, token) for role, token in (special or {}).items() if token is not None}
        self._chat_template = None if template is None else ChatTemplate(template, self.special)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        # Only tokens with an id: the tokenizer would give a new one an id beyond the model's embedding.
        known = [text for text in self.special.values() if tokenizer.token_to_id(text) is not None]
        tokenizer.add_special_tokens([text for text in known if text not in added])
        self._silent = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.markers = find(template, added)
        marks = () if self.markers is None else (self.markers.begin, self.markers.end)
        self._spoken = self._silent & {tokenizer.token_to_id(mark) for mark in marks}
        decoder = tokenizer.decoder.__getstate__() if tokenizer.decoder else b""
        self._spells_bytes = b'"ByteLevel"' in decoder
        self._has_byte_tokens = b'"ByteFallback"' in decoder

    def id_of(self, role: str) -> int | None:
        """Id of a special token by its role, such as `eos_token`; None if there is none."""
        return self.tokenizer.token_to_id(self.special[role]) if role in self.special else None

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Encode a text; `add_special` adds the tokenizer's special tokens, such as BOS.

        A rendered chat contains them already: encode it without.

        Raises:
            UsageError: the text isn't valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"Character {error.start} of the text is a lone surrogate, which no tokenizer reads; give valid UTF-8."
            ) from None
        return self.tokenizer.encode(text, add_special_tokens=add_special).ids

    def spells(self, tokens: Iterable[int], text: str) -> bool:
        """True if an answer of these tokens decodes to this text, byte for byte."""
        spelled = b""
        for token in tokens:
            if self.tokenizer.id_to_token(token) is None:
                return False
            spelled += self.piece(token, first=not spelled) or b""
        return spelled == text.encode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Render messages by the checkpoint's chat template; options as `ChatTemplate.render` takes them.

        Raises:
            UsageError: there is no template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise UsageError("This model has no chat template; send the prompt as plain text (--raw).")
        return self._chat_template.render(messages, **options)

    @property
    def variables(self) -> frozenset[str]:
        """Variables that the chat template reads and doesn't set; empty without a template."""
        return frozenset() if self._chat_template is None else self._chat_template.variables

    def piece(self, token: int, *, first: bool) -> bytes | None:
        """UTF-8 bytes of a token, maybe a part of a character; None for special and unknown tokens.

        The first token of a text may lose its leading space.
        """
        name = self.tokenizer.id_to_token(token)
        if name is not None and token in self._spoken:  # reasoning markers are text, also if they are special tokens
            return name.encode()
        if name is None or token in self._silent:
            return None
        if self._spells_bytes:
            spelled = [_SPELLED.get(letter) for letter in name]
            # Added tokens aren't in the byte alphabet: their names are their text.
            return name.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(name)) and match[1] >= "8":
            return bytes.fromhex(match[1])
        if first:
            return self.tokenizer.decode([token]).encode()
        anchor, width = self._anchor
        return self.tokenizer.decode([*anchor, token])[width:].encode()

    @cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """A token and its text's length: a token decoded after it keeps its leading space, as inside a text."""
        for token in range(self.tokenizer.get_vocab_size()):
            text = "" if token in self._silent else self.tokenizer.decode([token])
            if text and "\ufffd" not in text:
                return [token], len(text)
        return [], 0


def _content(role: str, token: object) -> str:
    content = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(content, str):
        return content
    raise ModelError(f"The tokenizer's {role} is {content!r}; it should be a string, or a table with its content.")
