"""Where a reasoning step ends: at a line's end, a sentence's end or the answer's, by the text of its tokens.

Takes tokens and a vocabulary; knows no model. A sentence ends with a letter and a full stop (or ! or ?), so that
neither the point of 3.5 nor the number of a list ends one; a line that ends with a number ends a step by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from longspec.text.tokenizer import Vocabulary

__all__ = ["STEP_TOKENS", "Steps"]

STEP_TOKENS = 64
"""Most tokens of a drafted step, which is what a stage of a pass holds; a longer one is verified exactly."""

_SENTENCE = re.compile(r"[^\W\d_][.!?][\"'”’)\]*]*$")


class Steps:
    """The borders of steps in a vocabulary's tokens. ends: tokens that end a text."""

    def __init__(self, vocabulary: Vocabulary, ends: Iterable[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._ends = frozenset(ends)
        self._pieces: dict[int, bytes] = {}

    def over(self, tokens: Sequence[int]) -> bool:
        """Whether a step ends with the last of these tokens. White space alone is no step."""
        if not tokens:
            return False
        if tokens[-1] in self._ends:
            return True
        ends = b"\n" in self._piece(tokens[-1]) or _SENTENCE.search(self.text(tokens[-2:])) is not None
        return ends and any(self._piece(token).strip() for token in tokens)

    def first(self, tokens: Sequence[int]) -> int | None:
        """The number of tokens of the first step; None where none ends."""
        return next((count for count in range(1, len(tokens) + 1) if self.over(tokens[:count])), None)

    def text(self, tokens: Iterable[int]) -> str:
        """The tokens' text, without special ones."""
        return b"".join(map(self._piece, tokens)).decode(errors="replace")

    def _piece(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._vocabulary.piece(token, first=False) or b""
        return self._pieces[token]
