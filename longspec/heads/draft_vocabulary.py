"""The draft vocabulary: the tokens that a head chooses among, so that its product with the LM head is over their rows.

Takes texts to count tokens in; gives ids. A token that isn't among them is never drafted, and is written all the same:
the target verifies with all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longspec.errors import UsageError
from longspec.machine.files import read_text
from longspec.model.load import Model

__all__ = ["hot_tokens", "most_frequent", "rounded"]

_UNIT = 64  # the kernels need a multiple of a tile
_MOST_NBYTES = 16 << 20  # of a text: four million tokens, which take some seconds to count


def hot_tokens(model: Model, size: int, text: str | Path = "") -> Tensor | None:
    """[D] int64, rising: the tokens that are the most frequent in a file of text, and those that end an answer. Of
    tokens that the text has as often, or has not, the lowest come first: tokenizers learn frequent ones early.

    size: of the vocabulary, 0 for all tokens, for which the result is None.

    Raises:
        UsageError: the size is below 0, or the file can't be read.
    """
    if size < 0:
        raise UsageError(f"The size of a draft vocabulary is {size}; it must be 0, for all tokens, or more.")
    said = read_text(Path(text), _MOST_NBYTES, "The text of hot tokens") if text and size else ""
    tokens = model.vocabulary.encode(said, add_special=False) if said else []
    return most_frequent([tokens], size, model.decoder.config.vocabulary, model.end_tokens)


def most_frequent(
    texts: Iterable[Sequence[int]], size: int, vocabulary: int, always: Sequence[int] = ()
) -> Tensor | None:
    """[D] int64, rising: the most frequent tokens of these, including `always`; None is all tokens."""
    size = rounded(size)
    if not size or size >= vocabulary:
        return None
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for text in texts:
        counts += torch.bincount(torch.tensor(text, dtype=torch.int64), minlength=vocabulary)
    counts[list(always)] += 1 << 40
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def rounded(size: int) -> int:
    """The size of a draft vocabulary of at least so many tokens."""
    return -(-size // _UNIT) * _UNIT
