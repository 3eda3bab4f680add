"""Store of earlier answers to draft from, in the user's cache directory; written only with `--remember`.

One file for each tokenizer: token ids of 4 bytes (little-endian), each answer ended by a mark. Whoever can read the
file can decode the answers: hence `--remember` is off by default, the file has mode 0600 and holds at most the newest
256 Ki tokens, and `longspec forget` deletes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from longspec.machine.system import cache_folder

__all__ = ["MOST_TOKENS", "Outputs", "forget", "outputs_folder"]

MOST_TOKENS = 1 << 18
_MARK = 0xFFFFFFFF


def outputs_folder() -> Path:
    return cache_folder() / "outputs"


def forget() -> int:
    """Delete the stored answers of all models; returns the bytes freed."""
    folder = outputs_folder()
    nbytes = sum(file.stat().st_size for file in folder.glob("*.tokens")) if folder.is_dir() else 0
    shutil.rmtree(folder, ignore_errors=True)
    return nbytes


class Outputs:
    """Answers in token ids of one tokenizer. tokenizer: its hash; vocabulary: its size."""

    def __init__(self, tokenizer: str, vocabulary: int) -> None:
        self.path = outputs_folder() / f"{tokenizer[:32]}.tokens"
        self.vocabulary = vocabulary

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the answers, oldest first; none if the file is missing or unreadable. Invalid answers are skipped."""
        try:
            if self.path.stat().st_size > 8 * MOST_TOKENS:
                return
            data = self.path.read_bytes()
        except OSError:
            return
        tokens = np.frombuffer(data[: len(data) // 4 * 4], "<u4")
        ends = np.flatnonzero(tokens == _MARK)
        for answer in np.split(tokens, ends + 1)[: len(ends)]:  # tokens after the last mark are a torn write
            if len(answer) > 1 and int(answer[:-1].max()) < self.vocabulary:
                yield answer[:-1].tolist()

    def add(self, answer: Sequence[int]) -> None:
        """Append an answer, dropping the oldest ones beyond the limit. A folder that can't be written is no error."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            line = np.asarray([*answer, _MARK], np.int64).astype("<u4").tobytes()
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                if torn := os.fstat(file).st_size % 4:
                    os.write(file, bytes(4 - torn) + b"\xff\xff\xff\xff")
                os.write(file, line)
                size = os.fstat(file).st_size
            finally:
                os.close(file)
            if size > 4 * MOST_TOKENS:
                self._halve()

    def _halve(self) -> None:
        kept: list[list[int]] = []
        total = 0
        for answer in reversed(list(self)):
            total += len(answer) + 1
            if total > MOST_TOKENS // 2:
                break
            kept.append(answer)
        new = self.path.with_suffix(".new")
        tokens = [token for answer in reversed(kept) for token in (*answer, _MARK)]
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(file, np.asarray(tokens, np.int64).astype("<u4").tobytes())
        finally:
            os.close(file)
        new.replace(self.path)
