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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspec.engine import Engine
from longspec.errors import ContextError, LongspecError, UsageError
from longspec.session import Session
from longspec.text import Vocabulary

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
    active: dict[int, Session] = {}
    inventing: set[int] = set()
    before = opening(engine.model.vocabulary) if invented else ""
    number, unusable = 0, 0
    last = max(texts, default=-1)  # numbers before it that the file lacks were unusable, or cut off
    try:
        with path.open("ab") as file:
            while True:
                done = _enough(texts, tokens)
                if done is not None:
                    return done
                written = sum(len(text.tokens) - text.prompt for text in texts.values())
                report("writing texts", min(written, tokens), tokens)
                while len(active) < TOGETHER and (written < tokens or number <= last):
                    if unusable > _TRIES * len(prompts):
                        raise UsageError(f"No prompt leaves room for an answer in {length} tokens; give shorter ones.")
                    if number not in texts:
                        session: Session | None
                        if number * 61 % 100 < invented:
                            session = _inventing(engine, before, number, length // 4, options)
                            inventing.add(number)
                        else:
                            session = _opened(engine, prompts[number % len(prompts)], number, length, options)
                        if session is None:
                            texts[number] = Text(number, 0, [])  # a place in the order, and nothing else
                            unusable += 1
                        else:
                            active[number] = session
                    number += 1
                if active:
                    engine.step(list(active.values()))
                for at in [at for at, session in active.items() if session.finish_reason is not None]:
                    session = active.pop(at)
                    if at in inventing:
                        inventing.remove(at)
                        prompt = engine.model.vocabulary.decode(session.answer).strip()
                        whole = session.finish_reason == "stop" and prompt != ""
                        answering = _opened(engine, prompt, at, length, options) if whole else None
                        if answering is not None:
                            active[at] = answering
                        else:
                            texts[at] = Text(at, 0, [])
                            unusable += 1
                        continue
                    unusable, texts[at] = 0, Text(at, session.prompt_length, session.tokens)
                    file.write(json.dumps(asdict(texts[at])).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
    except OSError as error:
        raise LongspecError(f"{path} can't be written: {error.strerror}.") from error


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


def _opened(engine: Engine, prompt: str, number: int, length: int, options: dict[str, Any]) -> Session | None:
    """A session, prefilled; None where the prompt takes more than half of the length."""
    try:
        session = engine.open(prompt, key=str(number), **options)
    except ContextError:
        return None
    if session.prompt_length > length // 2:
        return None
    session.limit = min(session.limit, length)
    for _ in engine.prefill(session):
        pass
    return session


def _inventing(engine: Engine, before: str, number: int, most: int, options: dict[str, Any]) -> Session:
    """A session that writes a prompt, prefilled; at a temperature of 1, so that no two are alike."""
    asked = {**options, "raw": True, "temperature": 1.0, "max_new_tokens": most}
    session = engine.open(before, key=f"prompt {number}", **asked)
    for _ in engine.prefill(session):
        pass
    return session


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
