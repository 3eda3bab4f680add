"""Few-shot examples for a request: cli/shell/examples.md, and the selection of the most similar ones.

Takes a request; gives pairs of a request and its command, the most similar last, with this request's file names and
numbers in place of their own. Knows no model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from importlib.resources import files

from longspec.cli.shell.similarity import SIZE, common, endings, likenesses, plain

__all__ = ["Pair", "adapted", "names", "nearest", "template"]

Pair = tuple[str, str]

_CALLED = r"(?<=\bcalled )[\w.-]+|(?<=\bnamed )[\w.-]+"
_NO_NAME = r"(?:and|by|called|from|here|in|into|is|named|of|that|to|with)\b"
_KINDS = [
    re.compile(_CALLED),
    re.compile(rf"\b(?:folder|directory) (?!{_NO_NAME})([\w-]+)"),
    re.compile(r"https?://[^\s'\"]*\w"),
    re.compile(r"\b[A-Z]{4,}\b"),
    re.compile(r"(?<![\w:/.])[\w/~-][\w./~-]*\.[A-Za-z]\w*"),
    re.compile(r"(?<![\w./])\d+(?= days?\b)"),
    re.compile(r"(?<![\w./])\d+(?= minutes?\b)"),
    re.compile(r"\b(?:column|field|word|row) (\d+)"),
    re.compile(r"(?<!column )(?<!field )(?<!word )(?<!row )(?<![\w./])\d+(?![\w./]| (?:days?|minutes?|[KMGT]B)\b)"),
]
"""What stands for something else in another request: names, addresses, files, numbers."""

_NAME = re.compile(rf"https?://[^\s'\"]*\w|[\w~./-]*\w\.\w+|\"[^\"]+\"|'[^']+'|\b[A-Z_]{{3,}}\b|\b\d+|{_CALLED}")
_UNITS = {
    "RAM",
    "CPU",
    "PDF",
    "CSV",
    "JSON",
    "URL",
    "GPU",
    "SSH",
    "DNS",
    "HTTP",
    "PATH",
    "PID",
    "USB",
    "ZIP",
    "JPG",
    "PNG",
}


@cache
def template() -> tuple[str, tuple[Pair, ...]]:
    """The system message, and all examples."""
    text = (files("longspec.cli.shell") / "examples.md").read_text(encoding="utf-8")
    system, *pairs = re.split(r"^# ", text.split("\n+++\n", 1)[-1], flags=re.MULTILINE)
    split = [pair.strip().split("\n", 1) for pair in pairs]
    return " ".join(system.split()), tuple((request, command) for request, command in split)


def names(text: str) -> set[str]:
    """The parts of a request that its command must repeat: files, addresses, quoted words, numbers."""
    said = re.sub(r"\b(?:column|field|word|row) \d+", "", plain(text))
    return {name.strip("'\"") for name in _NAME.findall(said)} - _UNITS


def nearest(pairs: Sequence[Pair], request: str, count: int) -> list[tuple[float, Pair]]:
    """The `count` examples most similar to the request, with their similarities; the most similar last."""
    near = likenesses([asked for asked, _ in pairs], request)
    order = sorted(range(len(pairs)), key=lambda i: near[i])
    spoken = Counter(word for asked, _ in pairs for word in set(re.findall(r"[a-z]+", asked.lower())))
    unheard = _own(request, {word for word, times in spoken.items() if times > 1})
    return [(near[i], adapted(pairs[i], request, unheard)) for i in order[len(order) - count :]]


def _own(request: str, spoken: set[str]) -> list[str]:
    """The request's own words: quoted texts, and words that are neither names nor in the examples."""
    if quoted := re.findall(r"(?<!\w)['\"]([^'\"]+)['\"]", request):
        return quoted
    words = [word.strip(",;:?!()") for word in plain(request).split()]
    marked = re.findall(r"\b(?:word|text|string) (\w+)", request)
    return list(
        dict.fromkeys(
            [*marked, *(word for word in words if word.isalpha() and word.lower() not in spoken and not common(word))]
        )
    )


def adapted(pair: Pair, request: str, unheard: Sequence[str] = ()) -> Pair:
    """An example with its names replaced by the request's: a small model copies from the prompt.

    unheard: the request's own words, for those of the example that are still unreplaced.
    """
    asked, command = plain(pair[0]), pair[1]
    request = plain(request)
    changes: dict[str, str] = {}
    for kind in _KINDS:
        mine = [match[match.lastindex or 0] for match in kind.finditer(request)]
        theirs = list(dict.fromkeys(match[match.lastindex or 0] for match in kind.finditer(asked)))
        changes |= dict(zip(theirs, mine, strict=False))
    changes = _aligned(asked, command, request) | changes
    left = [word for word in _held(asked, command) if word not in changes]
    changes |= dict(zip(left, [word for word in unheard if word not in changes.values()], strict=False))
    meant = endings(asked), endings(request)
    sizes = [re.findall(SIZE, text) for text in (asked, request)]
    for (number, unit), (other, letter) in zip(*sizes, strict=False):
        asked = asked.replace(f"{number} {unit}B", f"{other} {letter}B")
        command = re.sub(
            rf"\b{number}{unit}\b", other + (letter.lower() if letter == "K" else letter), command, flags=re.I
        )
    if changes:
        found = re.compile("|".join(_alone(name) for name in sorted(changes, key=len, reverse=True)))
        asked, command = (found.sub(lambda match: changes[match[0]], text) for text in (asked, command))
    for (word, ending), (own, other) in zip(*meant, strict=False):
        asked = re.sub(rf"\b{re.escape(word)}\b", own, asked)
        command = re.sub(rf"(?<=\.){re.escape(ending)}\b", other, command)
    return asked, command


def _held(asked: str, command: str) -> list[str]:
    """Words of an example's request that its command repeats, quoted or as a name."""
    words = [word.strip(",;:?!()") for word in asked.split()]
    return [
        word
        for word in dict.fromkeys(words)
        if word.isalpha() and word.lower() not in _EMPTY and re.search(rf"['/ ]{re.escape(word)}(?:['/]|$)", command)
    ]


def _aligned(asked: str, command: str, request: str) -> dict[str, str]:
    """A mapping from words of an example that its command repeats to the words between the same neighbours in the
    request.
    """
    theirs, mine = asked.split(), request.split()
    changes: dict[str, str] = {}
    match = SequenceMatcher(None, [word.lower() for word in theirs], [word.lower() for word in mine], autojunk=False)
    for kind, begin, end, start, stop in match.get_opcodes():
        if kind == "replace" and end - begin == stop - start:
            changes |= {
                a: b
                for a, b in zip(theirs[begin:end], mine[start:stop], strict=True)
                if min(len(a), len(b)) > 2
                and (a.isdigit(), "." in a) == (b.isdigit(), "." in b)
                and b.lower() not in _EMPTY
                and re.search(rf"(?<!-)(?!^){_alone(a)}", command)
            }
    return changes


def _alone(name: str) -> str:
    """A pattern of a name that isn't part of another one; of a number also in `7p` and `+100M`."""
    around = (
        (r"(?<![\d.])", r"(?![\d.])")
        if name.isdigit()
        else (r"(?<![\w.])", r"(?!\w|\.\w)" if "." in name else r"(?!\w)")
    )
    return re.escape(name).join(around)


_LITTLE = "the all any each every and are for from has how into its not out that this what where which who with"
_EMPTY = frozenset(_LITTLE.split())
"""Words that are no names, wherever they stand."""
