"""Questions about a command's arguments, and what makes harms of their answers.

Takes the words after a program's name; gives a harm as a phrase, or None. Knows no program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from longspec.cli.shell.bash_ast import Word

__all__ = [
    "Harm", "acting", "always", "either", "given", "has", "is_system", "is_void", "leading", "matching", "operands",
    "saying", "unless", "writing",
]  # fmt: skip

Harm = Callable[[Sequence[Word]], str | None]

_VOIDS = {"/dev/null", "/dev/stdout", "/dev/stderr", "/dev/tty", "-"}
_SYSTEM = re.compile(
    r"(/(dev|etc|boot|sys|proc|usr|bin|sbin|lib|lib64|System)(/|$))"
    r"|.*(^|/)\.(ssh|gnupg)/|.*(^|/)\.(bashrc|bash_profile|profile|zshrc|zshenv|zprofile|login)$|.*/config\.fish$"
)


def is_void(word: Word) -> bool:
    """Whether writing to this file keeps nothing, as with /dev/null."""
    return word.known and (word.text in _VOIDS or word.text.startswith("/dev/fd/"))


def is_system(word: Word) -> bool:
    """Whether this is a device, a system file, or a file that controls logins or shell start-up."""
    return _SYSTEM.match(re.sub(r"/(\./|/)*", "/", word.text)) is not None and not is_void(word)


def has(words: Sequence[Word], *flags: str, exact: bool = False) -> bool:
    """Whether one of the flags is given: `r` also in `-xrf`; `--force` also as `--forc`, unless `exact`."""
    for word in words:
        text = word.text
        if text == "--":
            return False
        for flag in flags:
            if flag.startswith("--"):
                name = text.split("=")[0]
                if name == flag or (not exact and len(name) > 4 and flag.startswith(name)):
                    return True
            elif len(flag) > 1:
                if text == flag:
                    return True
            elif re.match(r"-[A-Za-z0-9]", text) and flag in text[1:]:
                return True
    return False


def operands(words: Sequence[Word]) -> list[Word]:
    """The arguments that aren't options; an option's value counts as one."""
    found, open_ = [], True
    for word in words:
        if open_ and word.text == "--":
            open_ = False
        elif not (open_ and word.known and word.text.startswith("-") and word.text != "-"):
            found.append(word)
    return found


def always(harm: str) -> Harm:
    return lambda words: harm


def given(harm: str, *flags: str) -> Harm:
    """Harmful with one of these flags."""
    return lambda words: harm if has(words, *flags) else None


def unless(harm: str, *flags: str) -> Harm:
    """Harmful unless one of these flags is there."""
    return lambda words: None if has(words, *flags, exact=True) else harm


def saying(harm: str, *said: str) -> Harm:
    """Harmful where one of these words is among the arguments."""
    return lambda words: harm if {word.text for word in words} & set(said) else None


def matching(harm: str, pattern: str) -> Harm:
    """Harmful where the arguments, as one text, match."""
    search = re.compile(pattern, re.IGNORECASE | re.DOTALL).search
    return lambda words: harm if search(" ".join(word.text for word in words)) else None


def acting(harm: str, verbs: str, *, deep: bool = False) -> Harm:
    """Harmful where a verb is what the program is to do: its first operand, or one behind options, which may have
    values. deep: a group of verbs may go before (`docker image rm`).
    """
    groups = re.compile(
        "container|image|volume|network|system|compose|builder|pod|global|env|tool|pip|config|cache|store"
    )

    def acting(words: Sequence[Word]) -> str | None:
        texts = [word.text for word in words]
        for at, text in enumerate(texts):
            if text.startswith("-"):
                continue
            if re.fullmatch(verbs, text):
                return harm
            if not (deep and groups.fullmatch(text)) and not (at and texts[at - 1].startswith("-")):
                return None
        return None

    return acting


def leading(words: Sequence[Word], pattern: str) -> bool:
    """Whether an option in front of the operands matches from its beginning."""
    for word in words:
        if word.text == "--" or not word.text.startswith("-"):
            return False
        if re.match(pattern, word.text):
            return True
    return False


def writing(*flags: str) -> Harm:
    """Harmful where an option's value names a system file to write."""

    def harm(words: Sequence[Word]) -> str | None:
        texts = [word.text for word in words]
        for at, text in enumerate(texts):
            for flag in flags:
                value = text[len(flag) :].lstrip("=") or " ".join(texts[at + 1 : at + 2])
                if text.startswith(flag) and is_system(Word(value)):
                    return f"writes to {value}"
        return None

    return harm


def either(*harms: Harm) -> Harm:
    """The first harm of several."""
    return lambda words: next((said for harm in harms if (said := harm(words))), None)
