"""The examples that a model is shown before a request for a command: cli/shells/examples.md, and which of it is near.

Takes a request; gives pairs of a request and its command, the nearest last, about the files and numbers of this request
rather than their own. Knows no model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

__all__ = ["Pair", "adapted", "names", "nearest", "template"]

Pair = tuple[str, str]

_CALLED = r"(?<=\bcalled )[\w.-]+|(?<=\bnamed )[\w.-]+"
_KINDS = [
    re.compile(_CALLED),
    re.compile(r"https?://[^\s'\"]*\w"),
    re.compile(r"\b[A-Z]{4,}\b"),
    re.compile(r"(?<![\w:/.])[\w/~-][\w./~-]*\.[A-Za-z]\w*"),
    re.compile(r"(?<![\w./])\d+(?![\w./])"),
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
    text = (files("longspec.cli") / "shells" / "examples.md").read_text(encoding="utf-8")
    system, *pairs = re.split(r"^# ", text.split("\n+++\n", 1)[-1], flags=re.MULTILINE)
    split = [pair.strip().split("\n", 1) for pair in pairs]
    return " ".join(system.split()), tuple((request, command) for request, command in split)


def names(text: str) -> set[str]:
    """What a command for this request must say too: files, addresses, quoted words, numbers."""
    return {name.strip("'\"") for name in _NAME.findall(text)} - _UNITS


def nearest(pairs: Sequence[Pair], request: str, count: int) -> list[tuple[float, Pair]]:
    """Those whose requests share most with this one, by rare words, with how near each is; the nearest last."""
    stems = [_stems(each) for each, _ in pairs]
    found = Counter(stem for each in stems for stem in each)
    weight = {stem: math.log(1 + len(pairs) / number) for stem, number in found.items()}
    asked = _stems(request)
    near = [
        sum(weight[stem] for stem in each & asked) / math.sqrt(1 + sum(weight[stem] for stem in each)) for each in stems
    ]
    order = sorted(range(len(pairs)), key=lambda i: near[i])
    return [(near[i], adapted(pairs[i], request)) for i in order[len(order) - count :]]


def adapted(pair: Pair, request: str) -> Pair:
    """An example with the names of this request for its own: a small model copies what it sees."""
    asked, command = pair
    changes: dict[str, str] = {}
    for kind in _KINDS:
        mine = [match[0] for match in kind.finditer(request)]
        theirs = list(dict.fromkeys(match[0] for match in kind.finditer(asked)))
        changes |= dict(zip(theirs, mine, strict=False))
    if not changes:
        return pair
    found = re.compile("|".join(_alone(name) for name in sorted(changes, key=len, reverse=True)))
    asked, command = (found.sub(lambda match: changes[match[0]], text) for text in pair)
    return asked, command


def _alone(name: str) -> str:
    """A name where it is no part of another; a number also in `7p` and `+100M`."""
    around = (r"(?<![\d.])", r"(?![\d.])") if name.isdigit() else (r"(?<![\w.])", r"(?!\w|\.\w)")
    return re.escape(name).join(around)


_SAME = {
    same: stem
    for stem, others in {
        "count": "many number",
        "larg": "big bigger biggest over larger largest abov greatest",
        "small": "smaller smallest under below tiny",
        "director": "directory directori folder",
        "cont": "contain content insid has hav hold",
        "uniqu": "duplicat distinct",
        "sum": "add total",
        "revers": "descend highest backward",
        "extract": "unpack uncompress decompress untar",
        "compres": "pack archiv tarball tar zip",
        "delet": "remov eras",
        "renam": "chang",
        "memory": "ram mem",
        "modifi": "modify chang edit alter",
        "uppercas": "upper capital",
        "lowercas": "lower",
        "creat": "mak new",
        "download": "get fetch",
        "process": "program",
        "execut": "run runnable",
        "disk": "spac storag",
        "calculat": "time multiply plu divid minu what",
        "valu": "number",
        "user": "who people",
        "greater": "over abov",
        "branch": "branche",
    }.items()
    for same in others.split()
}
"""Words that ask for the same, by their stems."""

_SILENT = {
    "the",
    "a",
    "of",
    "in",
    "to",
    "and",
    "i",
    "on",
    "for",
    "that",
    "thi",
    "me",
    "my",
    "al",
    "it",
    "show",
    "print",
    "by",
}


def _stems(text: str) -> set[str]:
    """Words by their beginnings; for a file its kind, and one sign for all numbers."""
    words = re.findall(r"[a-z]+", re.sub(r"\S*\w\.[a-z]\w*|\S*/\S*", _kind, text.lower()))
    found = {re.sub(r"(ing|ed|es|s|e)$", "", word) if len(word) > 4 else word.rstrip("s") for word in words}
    found = {_SAME.get(stem, stem) for stem in found} - _SILENT
    return found | ({"#"} if re.search(r"\d", text) else set())


def _kind(match: re.Match[str]) -> str:
    return " url " if "://" in match[0] else f" {match[0].rsplit('.', 1)[-1]} file "
