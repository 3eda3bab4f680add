"""The similarity of two requests for a command, by their words alone.

Takes requests; gives their normalised words, and a similarity from 0 to 1. Knows no commands and no model. Number
words, time spans and sizes are normalised, so that those of one request can replace another's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

__all__ = ["ENDING", "SIZE", "common", "endings", "likenesses", "plain"]

SIZE = r"(?<![\w.])(\d+) ?([KMGT])(?:i?B\b|\w{2,3}bytes?\b)"

_DAYS = {"week": 7, "month": 30, "year": 365}
_COUNTED = "two three four five six seven eight nine ten eleven twelve"
_NUMBERS = {word: 2 + i for i, word in enumerate(_COUNTED.split())}
_NUMBERS |= {"twenty": 20, "thirty": 30, "fifty": 50, "hundred": 100}
_ORDERED = "first second third fourth fifth sixth seventh"
_PLACES = {word: 1 + i for i, word in enumerate(_ORDERED.split())}

_KNOWN_ENDINGS = """
avi bak bz2 c cc conf cpp cs css csv doc docx flac gif go gz h hpp html ini iso java jpeg jpg js json log lua md mkv mov
mp3 mp4 odt ogg pdf php pl png py pyc rar rb rs rst sh sql svg swift tar tex tgz tif tmp toml ts tsv txt wav webp xls
xlsx xml yaml yml zip
"""
ENDING = {name: name for name in _KNOWN_ENDINGS.split()} | {
    "haskell": "hs",
    "javascript": "js",
    "kotlin": "kt",
    "markdown": "md",
    "perl": "pl",
    "python": "py",
    "ruby": "rb",
    "rust": "rs",
    "shell": "sh",
    "text": "txt",
    "typescript": "ts",
}
"""How the names of such files end."""

_FILES = r"(?:files?|images?|photos?|pictures?|scripts?|documents?)"
_NAMED = re.compile(rf"(?<![\w/-])(?:\*?\.)?([A-Za-z]\w*)(?= (?:source |code )?{_FILES}\b)")

_GROUPS = """
large big bigger biggest larger largest over above greater greatest more exceeding exceed huge highest maximum
small smaller smallest under below less least lowest minimum tiny younger
directory directories folder subfolder subdirectory subdirectories
contain containing with mention mentioned match matching has have having include including hold
occur appear happen come
inside contents content
unique distinct different once
duplicate repeated repeat repeats repetition twice double
sum add total together
calculate compute
times multiply multiplied
reverse backward backwards reversed
descending decreasing
extract unpack uncompress decompress untar unzip
compress pack archive tarball tar zip
not without except excluding lacking skip ignore ignoring no never none don doesn isn but
delete remove erase
memory ram mem
modified modify change changed edit edited altered updated
uppercase capital capitals upper
lowercase lower
create make new
download fetch
process program task
run execute executable
disk space storage
value number numeric numerically
user account people
mean average
computer machine system
line row record
column field
old older oldest ago unchanged untouched
recent newest latest newer recently
find search look locate
sort order ordered arrange
replace swap substitute exchange
stop end kill terminate quit
using use
"""
_LITTLE = """
the a an of in to and i on for that this me my all it show print display output give get by is are be was were do does
there what which how please from at its their them those these can here
"""
_SILENT = frozenset(_LITTLE.split())


def plain(request: str) -> str:
    """The request with digits for number words and ordinals, days for weeks and months, minutes for hours."""
    said = re.sub(
        rf"\b({'|'.join(_PLACES)}) (column|field|word|row|line)\b", lambda m: f"{m[2]} {_PLACES[m[1]]}", request
    )
    said = re.sub(rf"(?<![\w./-])({'|'.join(_NUMBERS)})(?![\w/-]|\.\w)", lambda m: str(_NUMBERS[m[1]]), said)
    said = re.sub(r"\btoday\b", "in the last 1 days", said)
    said = re.sub(r"\b(?:this|last|past) (day|week|month|year|hour)\b", r"last 1 \1s", said)
    said = re.sub(r"(\d+) (week|month|year)s?\b", lambda m: f"{int(m[1]) * _DAYS[m[2]]} days", said)
    said = re.sub(r"(\d+) hours?\b", lambda m: f"{int(m[1]) * 60} minutes", said)
    said = re.sub(SIZE, lambda m: f"{m[1]} {m[2].upper()}B", said, flags=re.IGNORECASE)
    said = re.sub(r"\b(upper|lower) case\b", r"\1case", said)
    return re.sub(r"(?:\b(?:in|within|during) )?(?:\bthe )?\b(?:last|past) (?=\d+ (?:days|minutes))", "within ", said)


def endings(request: str) -> list[tuple[str, str]]:
    """Words that name a kind of file, each with its file name's suffix."""
    found = _NAMED.findall(request)
    return [(word, ending) for word in found if (ending := ENDING.get(word.lower())) is not None]


def common(word: str) -> bool:
    """Whether a word describes an action, whatever its object."""
    return word.lower() in _SILENT or word.lower() in ENDING or _stem(word.lower()) in _same()


def likenesses(requests: Sequence[str], request: str) -> list[float]:
    """The similarity of each request to this one: the weight of shared stems over the geometric mean of both
    requests' weights, rare stems weighing more (inverse document frequency).
    """
    stems = [_stems(plain(each)) for each in requests]
    found = Counter(stem for each in stems for stem in each)
    asked = _stems(plain(request))

    def weight(each: set[str]) -> float:
        return sum(math.log(1 + len(requests) / (found[stem] or 1)) for stem in each)

    own = weight(asked)
    return [weight(each & asked) / (math.sqrt(weight(each) * own) or 1.0) for each in stems]


def _stems(text: str) -> set[str]:
    """The stems of a text's words; a file is replaced by its kind, all numbers by one symbol."""
    said = re.sub(r"\b(?:how many|number of)\b", "count", text.lower())
    said = re.sub(r"\b(?:not|never) (?:been )?(?:modified|changed|edited|touched)\b", "unchanged", said)
    said = re.sub(
        r"\b(?:remove|drop|skip|without|no) (?:the |any )?(?:duplicate|repeat|repetition|repeated)s?\b", "unique", said
    )
    said = re.sub(r"\b(?:in|of|below) (?:this|the current) (?:folder|directory)\b", "", said)
    said = re.sub(r"\b(\d+) (?:to|through|and|-) (?=\d)", r"range \1 ", said)
    found = set(re.findall(r"[a-z]+", re.sub(r"\S*\w\.[a-z]\w*|\S*/\S*", _kind, said)))
    if meant := endings(said):
        found = found - {word for word, _ in meant} | {"file", "ending"}
    found = {_same().get(_stem(word), _stem(word)) for word in found - _SILENT}
    return found | ({"#"} if re.search(r"\d", said) else set())


@cache
def _same() -> dict[str, str]:
    """A mapping from a word's stem to that of its synonym group's first word."""
    groups = [line.split() for line in _GROUPS.split("\n") if line]
    return {_stem(word): _stem(group[0]) for group in groups for word in group}


def _stem(word: str) -> str:
    return re.sub(r"(ing|ed|es|s|e|ly)$", "", word) if len(word) > 4 else word.rstrip("s")


def _kind(match: re.Match[str]) -> str:
    return " url " if "://" in match[0] else f" {match[0].rsplit('.', 1)[-1]} file "
