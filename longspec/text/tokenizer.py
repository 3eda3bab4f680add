"""A checkpoint's vocabulary: from text to token ids, and from a token to its bytes.

Takes a tokenizer, a chat template and special tokens as plain values; knows no model, no file and no session.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NoReturn

from tokenizers import AddedToken, Encoding, Tokenizer

from longspec.calls import find as find_calls
from longspec.errors import ContextError, ModelError, UsageError
from longspec.text.chat_template import ChatTemplate
from longspec.text.limits import MOST_SECONDS, LateError, awaited
from longspec.text.think_tags import find
from longspec.text.turn_ends import TURN_ENDS

__all__ = ["LETTERS_PER_SECOND", "Vocabulary", "unusable"]

LETTERS_PER_SECOND = 100_000
"""That a tokenizer reads at least, beside the seconds that a template may take: a tenth of what they do here."""

# GPT-2's byte alphabet: a printable byte stands for itself, the others are mapped to 256, 257, ... in order.
_PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = sorted({*range(256)} - {*_PRINTS})
_SPELLED = {chr(byte): byte for byte in _PRINTS} | {chr(256 + i): byte for i, byte in enumerate(_MOVED)}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """A checkpoint's tokenizer, with its chat template and its special tokens (`{"bos_token": "<s>", ...}`).

    A special token is a string, or a mapping with its `content`, as in tokenizer_config.json. The tokens that are known
    to end a turn (`TURN_ENDS`) are special too, whatever the tokenizer says of them. The vocabulary takes over the
    tokenizer, and switches off truncation and padding that its file may set.

    begins: a rendered chat begins with the BOS token, also where the template doesn't write it.

    Raises:
        ModelError: a special token is neither.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special: Mapping[str, object] | None = None,
        template: str | None = None,
        *,
        begins: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.begins = begins
        self.special = {role: _content(role, token) for role, token in (special or {}).items() if token is not None}
        self._chat_template = None if template is None else ChatTemplate(template, self.special)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        # Only tokens with an id: the tokenizer would give a new one an id beyond the model's embedding.
        self.markers, self.calls = find(template, added), find_calls(template)
        # In harmony <|end|> ends a message, of which an answer has several.
        ends = TURN_ENDS.difference(self.markers.tokens if self.markers else ())
        named = [*self.special.values(), *sorted(ends)]
        known = [text for text in named if tokenizer.token_to_id(text) is not None]
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in known if text not in added])
        self.turn_ends = tuple(i for text in sorted(ends) if (i := tokenizer.token_to_id(text)) is not None)
        decoder_of_added = tokenizer.get_added_tokens_decoder()
        self._silent = {i for i, token in decoder_of_added.items() if token.special} | set(self.turn_ends)
        spoken = (*(self.markers.tokens if self.markers else ()), *(self.calls.tokens if self.calls else ()))
        self._spoken = self._silent & {tokenizer.token_to_id(mark) for mark in spoken}
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
        return self._encoding(text, add_special=add_special).ids

    def encode_chat(self, text: str, cuts: Sequence[int]) -> list[int]:
        """Encode a rendered chat, in which a special token that lies over one of these offsets is plain text.

        Without such a token the tokens are those of `encode`.

        Raises:
            UsageError: the text isn't valid Unicode, or the tokenizer can't write a special token as plain text.
        """
        encoding = self._encoding(text)
        spans = self._special_spans(text, encoding) if cuts else []
        own = [(start, end, token) for start, end, token in spans if not _lies_over(cuts, start, end)]
        if len(own) == len(spans):
            return encoding.ids
        plain, name, stand_in = self._plain
        pieces, done = [], 0
        for start, end, _ in own:
            pieces += [text[done:start], name]
            done = end
        rest = "".join([*pieces, text[done:]])
        ids: list[int] = _encoded(partial(plain.encode_batch_fast, [rest], add_special_tokens=False), rest).ids
        written = iter([token for _, _, token in own])
        whole = [next(written) if token == stand_in else token for token in ids]
        unknown = self.tokenizer.token_to_id(self.special.get("unk_token", ""))
        found = [token for token in whole if token in self._silent and token != unknown]
        if found != [token for _, _, token in own if token != unknown]:
            raise UsageError(
                "A message holds the name of a special token, which this model's tokenizer can't write as plain text; "
                "leave it out, or allow it (--allow-special-tokens)."
            )
        return whole

    def special_in(self, text: str) -> set[str]:
        """The texts of more than one letter that are special tokens where this text is encoded as it is."""
        spans = self._special_spans(text, self._encoding(text))
        return {text[start:end] for start, end, _ in spans if end - start > 1}

    def _special_spans(self, text: str, encoding: Encoding) -> list[tuple[int, int, int]]:
        """The special tokens of an encoding: first offset, offset behind the last, and id of each."""
        unknown = self.special.get("unk_token")
        spans = []
        for i, token in enumerate(encoding.ids):
            if token in self._silent and (place := encoding.token_to_chars(i)) is not None:
                start, end = place
                name = text[start:end].strip()  # a token may take the blanks around it
                start += len(text[start:end]) - len(text[start:end].lstrip())
                if name == unknown or self.tokenizer.id_to_token(token) != unknown:
                    spans.append((start, start + len(name), token))
        return spans

    @cached_property
    def first_letters(self) -> frozenset[str]:
        """The letters that special tokens of more than one letter begin with."""
        names = [self.tokenizer.id_to_token(token) or "" for token in self._silent]
        return frozenset(name[0] for name in names if len(name) > 1)

    def is_spoken(self, token: int) -> bool:
        """Whether it is a special token that is text: a mark of thoughts or calls."""
        return token in self._spoken

    def special_ids(self, texts: Iterable[str]) -> list[int]:
        """Ids of the special tokens among these texts: they are never in an answer's text."""
        ids = [self.tokenizer.token_to_id(text) for text in texts]
        return [i for i in ids if i is not None and i in self._silent and i not in self._spoken]

    def has_special(self, tokens: Iterable[int]) -> bool:
        """Whether one of the tokens is special, other than a reasoning marker."""
        return any(token in self._silent and token not in self._spoken for token in tokens)

    @cached_property
    def _plain(self) -> tuple[Tokenizer, str, int]:
        """The tokenizer that reads no special tokens, and the name and id of a token that stands for one.

        It shares the model's tables. Its added tokens have the same ids, as they are added in the same order. The name
        is drawn, so that no text can hold it.
        """
        plain, added = Tokenizer(self.tokenizer.model), sorted(self.tokenizer.get_added_tokens_decoder().items())
        for i, token in added:
            token.special = i in self._silent
        plain.add_tokens([token for _, token in added])  # at once: each call reads all of them again
        if any(plain.token_to_id(token.content) != i for i, token in added):  # ids that leave some out
            plain = Tokenizer.from_str(self.tokenizer.to_str())
            plain.add_special_tokens([token for i, token in added if i in self._silent])
        if self.tokenizer.normalizer is not None:
            plain.normalizer = self.tokenizer.normalizer
        if self.tokenizer.pre_tokenizer is not None:
            plain.pre_tokenizer = self.tokenizer.pre_tokenizer
        plain.encode_special_tokens = True
        name = "\U000f0000" + secrets.token_hex(16)
        plain.add_tokens([AddedToken(name, normalized=False)])
        stand_in = plain.token_to_id(name)
        assert stand_in is not None
        return plain, name, stand_in

    def _encoding(self, text: str, *, add_special: bool = False) -> Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"Character {error.start} of the text is a lone surrogate, which no tokenizer reads; give valid UTF-8."
            ) from None
        # Unlike `encode`, this one lets other threads run meanwhile: 4 MB take seconds.
        return _encoded(partial(self.tokenizer.encode_batch, [text], add_special_tokens=add_special), text)

    def check_length(self, text: str, room: int | None) -> None:
        """Raise ContextError where a text must have more than `room` tokens, as the longest token is short."""
        if room is not None and len(text) > room and len(text) > room * self._longest:
            raise ContextError(
                f"The prompt has {len(text):,} characters; the {room:,} tokens of the context that there is room for "
                f"hold at most {room * self._longest:,}."
            )

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
        if name is not None and token in self._spoken:  # marks of thoughts and calls are text, also if special
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
            return self._decoded([token]).encode()
        anchor, width = self._anchor
        return self._decoded([*anchor, token])[width:].encode()

    def _decoded(self, tokens: list[int]) -> str:
        try:
            return self.tokenizer.decode(tokens)
        except BaseException as error:  # noqa: BLE001  passed on unless it is the library's
            unusable(error)

    @cached_property
    def _longest(self) -> int:
        """The most characters that a token stands for. A normaliser may merge characters before tokens are found: four
        at the most where they mean one.
        """
        longest = max(map(len, self.tokenizer.get_vocab(with_added_tokens=True)), default=1)
        return longest if self.tokenizer.normalizer is None else 4 * longest

    @cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """A token and its text's length: a token decoded after it keeps its leading space, as inside a text."""
        for token in range(self.tokenizer.get_vocab_size()):
            text = "" if token in self._silent else self._decoded([token])
            if text and "\ufffd" not in text:
                return [token], len(text)
        return [], 0


def _encoded(encode: Callable[[], list[Encoding]], text: str) -> Encoding:
    """The encoding of one text, which a stranger's regular expression may keep from ever coming.

    Raises:
        ModelError: the tokenizer takes too long, or fails at this text.
    """
    seconds = MOST_SECONDS + len(text) / LETTERS_PER_SECOND
    try:
        return awaited(encode, seconds)[0]
    except LateError:
        raise ModelError(
            f"The model's tokenizer takes more than {seconds:.0f} seconds for {len(text):,} letters; its "
            "tokenizer.json isn't that of a published model: fetch it again."
        ) from None
    except BaseException as error:  # noqa: BLE001  as above
        unusable(error)


def unusable(error: BaseException, what: str = "The model's tokenizer can't be used: it fails") -> NoReturn:
    """Raise ModelError, which begins with `what`, for what a call of the library has raised: nothing narrower than
    Exception, and its panics are none. A signal is raised itself.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    said = " ".join(str(error).split())[:200]
    raise ModelError(f"{what} ({said}); fetch it again.") from error


def _lies_over(cuts: Sequence[int], start: int, end: int) -> bool:
    """Whether one of the ascending cuts is inside, not at an end."""
    at = bisect_right(cuts, start)
    return at < len(cuts) and cuts[at] < end


def _content(role: str, token: object) -> str:
    content = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(content, str):
        return content
    raise ModelError(f"The tokenizer's {role} is {content!r}; it should be a string, or a table with its content.")
