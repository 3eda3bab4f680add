"""Texts that the target itself writes: what a head must learn to foresee.

Takes prompts and an engine; gives texts, several written side by side. Each is a line of a file as soon as it is whole,
and a text is a function of its prompt, its number and the seed: a run that was killed goes on where the file ends, and
ends with the same texts.

Some of the prompts may be the target's own: it goes on from where its chat template has a user speak (Magpie,
2406.08464). They are as various as what it was trained on, where a file of prompts is of one kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.errors import ContextError, LongspecError, UsageError
from longspec.text.detokenizer import decode
from longspec.text.tokenizer import Vocabulary

__all__ = ["Text", "distil", "opening", "read_prompts", "read_texts"]

Report = Callable[[str, int, int], None]

TOGETHER = 16
"""Texts that are written at once: a pass of 16 rows costs a tenth more than one of 1."""

_MOST_LINE = 1 << 20
_MOST_PROMPTS = 1_000_000
_MARK = "\u2042\u2042"  # asterisms: nothing that a template says itself
_TRIES = 8  # prompts in a row that are too long to be used, times the prompts that there are


@dataclass(frozen=True, slots=True)
class Text:
    number: int  # its place in the endless list of prompts: the file's, again and again
    prompt: int  # tokens of the prompt
    tokens: list[int]  # prompt and answer


def read_prompts(path: Path) -> list[str]:
    """Of a JSONL file: each line an object with a `prompt`, or with `turns`, of which the first is taken.

    Raises:
        UsageError: it can't be read, or a line is neither.
    """
    prompts = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MOST_LINE + 1), b""), 1):
                if not line.strip():
                    continue
                prompt = _prompt(line) if len(line) <= _MOST_LINE and number <= _MOST_PROMPTS else None
                if not prompt:
                    raise UsageError(
                        f'{path}:{number} is no prompt; a line is an object like {{"prompt": "..."}} of at most 1 MiB, '
                        f"and a file has at most {_MOST_PROMPTS:,}."
                    )
                prompts.append(prompt)
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.") from error
    return prompts


def distil(
    engine: Engine,
    prompts: Sequence[str],
    path: Path,
    *,
    tokens: int,
    length: int,
    options: dict[str, Any],
    report: Report,
    invented: int = 0,
) -> list[Text]:
    """Texts of at most `length` tokens, until the answers have `tokens` together. options: of `Engine.open`.

    invented: of a hundred texts, how many answer a prompt that the target invents.

    Raises:
        UsageError: the file isn't of such texts, no prompt leaves room for an answer, or there is no chat template to
            invent one.
        LongspecError: the file can't be written.
    """
    texts = {text.number: text for text in read_texts(path, engine.model.decoder.config.vocabulary)}
    desk = _Desk(engine, prompts, length, options, invented)
    number, unusable = 0, 0
    last = max(texts, default=-1)  # numbers before it that the file lacks were unusable, or cut off
    try:
        with path.open("ab") as file:
            while (done := _enough(texts, tokens)) is None:
                written = sum(len(text.tokens) - text.prompt for text in texts.values())
                report("writing texts", min(written, tokens), tokens)
                while len(desk.active) < TOGETHER and (written < tokens or number <= last):
                    if unusable > _TRIES * len(prompts):
                        raise UsageError(f"No prompt leaves room for an answer in {length} tokens; give shorter ones.")
                    if number not in texts and not desk.begin(number):
                        texts[number] = Text(number, 0, [])  # a place in the order, and nothing else
                        unusable += 1
                    number += 1
                for at, session in desk.step():
                    if session is None:
                        texts[at] = Text(at, 0, [])
                        unusable += 1
                        continue
                    unusable, texts[at] = 0, Text(at, session.prompt_length, session.tokens)
                    file.write(json.dumps(asdict(texts[at])).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            return done
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror}.") from error


class _Desk:
    """The texts that are being written, by their numbers: of prompts that are given, or are invented first."""

    def __init__(
        self, engine: Engine, prompts: Sequence[str], length: int, options: dict[str, Any], invented: int
    ) -> None:
        self.active: dict[int, Session] = {}
        self._inventing: set[int] = set()
        self._engine, self._prompts, self._length, self._options = engine, prompts, length, options
        self._invented = invented
        self._before = opening(engine.model.vocabulary) if invented else ""

    def begin(self, number: int) -> bool:
        """Whether its prompt can be used, as far as that is known."""
        if number * 61 % 100 >= self._invented:
            return self._answer(number, self._prompts[number % len(self._prompts)])
        # At a temperature of 1, so that no two are alike.
        asked = {**self._options, "raw": True, "temperature": 1.0, "max_new_tokens": self._length // 4}
        self._open(number, self._engine.open(self._before, key=f"prompt {number}", **asked))
        self._inventing.add(number)
        return True

    def step(self) -> Iterator[tuple[int, Session | None]]:
        """A pass; the texts that ended with it. None: the prompt that was invented can't be used."""
        if self.active:
            self._engine.step(list(self.active.values()))
        for number in [number for number, session in self.active.items() if session.finish_reason is not None]:
            session = self.active.pop(number)
            if number not in self._inventing:
                yield number, session
                continue
            self._inventing.remove(number)
            prompt = decode(self._engine.model.vocabulary, session.answer).strip()
            if session.finish_reason != "stop" or not prompt or not self._answer(number, prompt):
                yield number, None

    def _answer(self, number: int, prompt: str) -> bool:
        """Not where the prompt takes more than half of the length."""
        try:
            session = self._engine.open(prompt, key=str(number), **self._options)
        except ContextError:
            return False
        if session.prompt_length > self._length // 2:
            return False
        session.limit = min(session.limit, self._length)
        self._open(number, session)
        return True

    def _open(self, number: int, session: Session) -> None:
        for _ in self._engine.prefill(session):
            pass
        self.active[number] = session


def opening(vocabulary: Vocabulary) -> str:
    """What the chat template writes before a user's first words.

    Raises:
        UsageError: there is no template, or it changes what users say.
    """
    before, found, _ = vocabulary.chat([{"role": "user", "content": _MARK}], add_generation_prompt=False).partition(
        _MARK
    )
    if not found:
        raise UsageError("The model's chat template doesn't write a user's words as they are: it can't invent prompts.")
    return before.removeprefix(vocabulary.special.get("bos_token") or "")  # which stands before every plain text


def read_texts(path: Path, vocabulary: int) -> list[Text]:
    """The file's texts; none where there is no file. What was half written is cut off.

    Raises:
        UsageError: a line isn't such a text.
    """
    if not path.exists():
        return []
    texts, whole = [], 0
    with path.open("rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            texts.append(_text(line, vocabulary, f"{path}:{number}"))
        file.truncate(whole)
    return texts


def _enough(texts: dict[int, Text], tokens: int) -> list[Text] | None:
    """The first texts that have so many tokens in their answers: the same, in whatever order they were finished."""
    chosen: list[Text] = []
    written = 0
    while written < tokens:
        text = texts.get(len(chosen))
        if text is None:
            return None
        chosen.append(text)
        written += len(text.tokens) - text.prompt
    return [text for text in chosen if text.tokens]


def _text(line: bytes, vocabulary: int, place: str) -> Text:
    try:
        said = json.loads(line)
        text = Text(said["number"], said["prompt"], said["tokens"])
        numbers = [text.number, text.prompt, *text.tokens]
        good = all(type(number) is int and number >= 0 for number in numbers)
    except (ValueError, RecursionError, KeyError, TypeError):
        good = False
    if not good or not 0 < text.prompt < len(text.tokens) or max(text.tokens) >= vocabulary:
        raise UsageError(f"{place} is no text of this model's; name another folder, or delete the file.")
    return text


def _prompt(line: bytes) -> str | None:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    turns = said.get("turns")
    prompt = said.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
    return prompt if isinstance(prompt, str) else None
