"""Detection of a model's reasoning markers: <think> and </think>, [THINK] and [/THINK], channels, and the like.

Takes a chat template and the texts of a vocabulary's added tokens: checkpoints declare the markers nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Markers", "find"]

# Also <|begin_of_thought|>, <|START_THINKING|>, <seed:think>, and their end markers.
_TAG = re.compile(r"[<\[◁][^\s<>\[\]◁▷'\"{}\\]{0,40}(?:think|thought|reason)[^\s<>\[\]◁▷'\"{}\\]{0,40}[>\]▷]", re.I)
_BEGINS = re.compile(r"begin|start", re.I)


@dataclass(frozen=True, slots=True)
class Markers:
    """The begin and end marker of a reasoning section."""

    begin: str
    end: str
    lead: str = ""  # what the answer behind it begins with, and is no part of
    special: tuple[str, ...] = ()  # special tokens that these are made of, beside each other

    @property
    def tokens(self) -> tuple[str, ...]:
        """What vocabularies may have as special tokens, and is text here."""
        return self.special or (self.begin, self.end)


_HARMONY = Markers(
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant",
    "<|channel|>final<|message|>",
    ("<|start|>", "<|end|>", "<|channel|>", "<|message|>"),
)
"""gpt-oss's: an answer is messages on channels, of which `analysis` has the thoughts and comes first."""

_GEMMA = Markers("<|channel>thought", "<channel|>", special=("<|channel>", "<channel|>"))
"""Gemma 4's."""


def find(template: str | None, added: Iterable[str]) -> Markers | None:
    """The marker pair that the template contains, else one among the added tokens; None if there is none."""
    for channel in (_HARMONY, _GEMMA):
        if channel.begin in (template or ""):
            return channel
    named = _TAG.findall(template or "")
    known = dict.fromkeys([*named, *filter(_TAG.fullmatch, added)])  # an ordered set
    pairs = [Markers(tag, end) for tag in known for end in _ends(tag) if end in known]
    return max(pairs, key=lambda pair: (pair.begin in named) + (pair.end in named), default=None)


def _ends(tag: str) -> list[str]:
    """Candidates for the end marker that belongs to a begin marker."""
    ends = [f"{tag[0]}/{tag[1:]}", f"{tag[:2]}/{tag[2:]}"]
    if _BEGINS.search(tag):
        ends.append(_BEGINS.sub(lambda word: "END" if word[0].isupper() else "end", tag, count=1))
    return ends
