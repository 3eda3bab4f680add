"""How a model's texts mark their reasoning: <think> and </think>, [THINK] and [/THINK], and their like.

Takes a chat template and the tokens that were added to a vocabulary, as texts; nothing else says it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Markers", "find"]

# Also <|begin_of_thought|>, <|START_THINKING|>, <seed:think>, and what ends them.
_TAG = re.compile(r"[<\[◁][^\s<>\[\]◁▷'\"{}\\]{0,40}(?:think|thought|reason)[^\s<>\[\]◁▷'\"{}\\]{0,40}[>\]▷]", re.I)
_BEGINS = re.compile(r"begin|start", re.I)


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands before the thoughts, and behind them."""

    begin: str
    end: str


def find(template: str | None, added: Iterable[str]) -> Markers | None:
    """The pair that the template names, or else one of the added tokens; None where there is none."""
    named = _TAG.findall(template or "")
    known = dict.fromkeys([*named, *filter(_TAG.fullmatch, added)])  # in the order in which they come
    pairs = [Markers(tag, end) for tag in known for end in _ends(tag) if end in known]
    return max(pairs, key=lambda pair: (pair.begin in named) + (pair.end in named), default=None)


def _ends(tag: str) -> list[str]:
    """How the end of a section may be written that begins like this."""
    ends = [f"{tag[0]}/{tag[1:]}", f"{tag[:2]}/{tag[2:]}"]
    if _BEGINS.search(tag):
        ends.append(_BEGINS.sub(lambda word: "END" if word[0].isupper() else "end", tag, count=1))
    return ends
