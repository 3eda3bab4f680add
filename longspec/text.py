"""Between characters and tokens: prompts to token ids, and token ids to the characters that are certain so far.

Takes a tokenizer, a chat template and special tokens as plain values; knows no model, no file and no session.

All text leaves through `TextStream`, a whole answer too, so a stream can't differ from its end. It is what the
tokenizer's own decoder gives, except for byte tokens (`<0xE2>`) that aren't UTF-8 together: there only the broken bytes
become U+FFFD, as in a byte-level vocabulary, where that decoder would take back the whole run of them.
Offsets count characters of the answer, from its first token.
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from longspec.errors import ModelError, UsageError
from longspec.markers import find

__all__ = ["Prompt", "StopFinder", "TextStream", "Transcript", "Vocabulary", "encode"]

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation: `{"role": ..., "content": ...}`.

An answer's message may have the `tokens` that the model itself wrote: they stand for its content where they spell it.
"""

# GPT-2's spelling of bytes: a byte that prints stands for itself, the others are moved up from 256 in their order.
_PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = sorted({*range(256)} - {*_PRINTS})
_SPELLED = {chr(byte): byte for byte in _PRINTS} | {chr(256 + i): byte for i, byte in enumerate(_MOVED)}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """A checkpoint's tokenizer, with its chat template and its special tokens (`{"bos_token": "<s>", ...}`).

    A special token is a string, or a table with its `content`, as tokenizer_config.json has it. The tokenizer belongs
    to the vocabulary from here on: the truncation and padding that its file may ask for are switched off.

    Raises:
        ModelError: a special token is neither.
    """

    def __init__(
        self, tokenizer: Tokenizer, special: Mapping[str, object] | None = None, template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.special = {role: _content(role, token) for role, token in (special or {}).items() if token is not None}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        # Only what the model has a row for: a token that is new to the tokenizer would get an id beyond the model.
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
        """The id of a special token by its role, such as `eos_token`; None where there is none."""
        return self.tokenizer.token_to_id(self.special[role]) if role in self.special else None

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """The tokens of a text; `add_special` puts the tokenizer's own around it, such as the one that begins a text.

        A rendered chat already has them: encode it without.

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
        """Whether an answer of these tokens is this text, byte for byte and without an incomplete character."""
        spelled = b""
        for token in tokens:
            if self.tokenizer.id_to_token(token) is None:
                return False
            spelled += self.piece(token, first=not spelled) or b""
        return spelled == text.encode(errors="replace")

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of an answer's tokens, without special tokens and without an incomplete last character."""
        return "".join(map(TextStream(self).push, tokens))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The messages as the checkpoint's template writes them; `variables` are the template's own switches.

        Raises:
            UsageError: there is no template, or it refuses the messages.
        """
        if self.template is None:
            raise UsageError("This model has no chat template; send the prompt as plain text (--raw).")
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled.render({**self.special, **given, **variables})
        except Exception as error:  # a template is a stranger's program, and may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise UsageError(
                f"The model's chat template failed ({reason}); change the messages, or send plain text (--raw)."
            ) from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """What the template reads and doesn't set itself; nothing where it can't be read."""
        try:
            return frozenset(meta.find_undeclared_variables(_environment().parse(self.template or "")))
        except Exception:  # noqa: BLE001  a stranger's program; what is wrong with it is said when it is used
            return frozenset()

    @cached_property
    def _compiled(self) -> Template:
        return _environment().from_string(self.template or "")

    def piece(self, token: int, *, first: bool) -> bytes | None:
        """What a token adds to a text, in UTF-8 that may be a part of a character; None for special and unknown tokens.

        The first token of a text may lose its leading space.
        """
        name = self.tokenizer.id_to_token(token)
        if name is not None and token in self._spoken:  # it tells a reader where the thoughts end
            return name.encode()
        if name is None or token in self._silent:
            return None
        if self._spells_bytes:
            spelled = [_SPELLED.get(letter) for letter in name]
            # A token that was added to the vocabulary is written as it reads.
            return name.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(name)) and match[1] >= "8":
            return bytes.fromhex(match[1])
        if first:
            return self.tokenizer.decode([token]).encode()
        anchor, width = self._anchor
        return self.tokenizer.decode([*anchor, token])[width:].encode()

    @cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """A token with text of its own, and that text's length: behind it, another is decoded as inside a text."""
        for token in range(self.tokenizer.get_vocab_size()):
            text = "" if token in self._silent else self.tokenizer.decode([token])
            if text and "\ufffd" not in text:
                return [token], len(text)
        return [], 0


class TextStream:
    """The text of tokens that come one by one, in whole characters, each given once nothing can change it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._held = b""
        self._first = True
        self.length = 0  # characters given
        self.begins: list[int] = []
        """For each token, the offset at which its text begins; all parts of one character begin where it does."""

    def push(self, token: int) -> str:
        """The characters that are certain with this token; bytes of an incomplete one are held until it is complete."""
        piece = self._vocabulary.piece(token, first=self._first)
        begin, text = self.length, ""
        if piece is not None:
            self._first = False
            # Bytes that can't continue the held ones turn those into a U+FFFD, and begin behind it.
            begin += len((self._held + piece[:1]).decode(errors="replace")) > 1
            data = self._held + piece
            text, used = codecs.utf_8_decode(data, "replace", False)
            self._held = data[used:]
            lost = self._held.decode(errors="replace")
            if len(lost) > 1:  # half a surrogate pair: Python waits for its end, though UTF-8 can't hold one
                text, self._held = text + lost, b""
        self.begins.append(begin)
        self.length += len(text)
        return text


class StopFinder:
    """Finds the first stop string in a text that comes in pieces, and shows nothing that one may still take back.

    The first is the one that a look after every character would find: that which ends first, and of several that
    end together the longest. This doesn't depend on how the text is cut. No stop string never stops.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        if "" in self._stops:
            raise UsageError("A stop string is empty, which would end every text at once; give at least one character.")
        beginnings = {stop[:n] for stop in self._stops for n in range(1, len(stop))}
        self._beginnings = sorted(beginnings, key=len, reverse=True)
        self._held = ""
        self._shown = 0
        self.found: int | None = None  # the offset at which the text ends: that of the stop string's first character

    def push(self, text: str) -> str:
        """What may be shown now; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, stop = min(ends, key=lambda each: each[0])  # of equals the first, and the longest stand first
            self.found = self._shown + end - len(stop)
            keep = end - len(stop)
            self._held = ""
        else:
            self._held = next((each for each in self._beginnings if text.endswith(each)), "")
            keep = len(text) - len(self._held)
        self._shown += keep
        return text[:keep]

    def close(self) -> str:
        """The rest, at the end of a text that holds no stop string."""
        held, self._held = self._held, ""
        self._shown += len(held)
        return held


class Transcript:
    """One answer as it is written: tokens in, text out, up to the first stop string.

    After `push`, where `stopped`, the answer's tokens are its first `kept`; else, when it ends, `close` gives the rest.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Iterable[str] = ()) -> None:
        self._stream = TextStream(vocabulary)
        self._finder = StopFinder(stops)

    @property
    def stopped(self) -> bool:
        """A stop string was found; what is pushed from here on is not in the text."""
        return self._finder.found is not None

    @property
    def begins(self) -> Sequence[int]:
        """For each pushed token, the offset in the text at which it begins."""
        return self._stream.begins

    @property
    def kept(self) -> int:
        """How many of the pushed tokens belong to the text: all, or those that begin before the stop string.

        A stop string over several steps makes it fall below what was kept after an earlier one.
        """
        begins, found = self._stream.begins, self._finder.found
        return len(begins) if found is None else bisect_left(begins, found)

    def push(self, token: int) -> str:
        """What may be shown now that this token is in the text."""
        return "" if self.stopped else self._finder.push(self._stream.push(token))

    def close(self) -> str:
        """The text that was held back, when the answer ends otherwise; an incomplete last character is dropped."""
        return self._finder.close()


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """As chat templates expect it: jinja's own would escape what HTML can't hold."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _content(role: str, token: object) -> str:
    content = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(content, str):
        return content
    raise ModelError(f"The tokenizer's {role} is {content!r}; it should be a string, or a table with its content.")


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
