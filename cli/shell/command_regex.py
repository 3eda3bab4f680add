"""A regular expression for constrained decoding of a shell line: commands that begin with the name of an installed
program.

Takes the names of programs; gives an expression for `Options.regex`. Quotes, `$( )` and pipes are balanced, every
command begins with one of the programs, and there is one line: prose doesn't begin with a program's name, or stops
being a line of shell words. It accepts more than the shell's grammar, which environment.py checks afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["form"]

_MOST_WORDS = 16
"""Behind a program; a model that repeats itself ends there."""

_LETTER = r"[A-Za-z0-9_./~*?%+=:,@^\[\]-]"
_QUOTED = r"'[^'\n]*'|\"[^\"`\n\\]*\""
_VALUE = r"\$[A-Za-z_]+|\$\{[^{}'\"`\n]*\}|\$\(\([^()'\"`\n]*\)\)"
_SIGN = r"\\[^\n]|\{\}|\{[a-z0-9.,]+\}"
_BETWEEN = r" (\||\|\||&&) |; "


def form(programs: Iterable[str], shell: str = "bash") -> str:
    """The expression for a line of these programs; with loops and `<( )` only for shells with
    bash's syntax for them.
    """
    program = "(" + "|".join(re.escape(name) for name in sorted(set(programs))) + ")"
    plain = f"({_LETTER}|{_QUOTED}|{_VALUE}|{_SIGN})+"
    inner = f"{program}( {plain}){{0,8}}"
    inner = f"{inner}( \\| {inner})?( < {plain})?"
    nested = rf"\$\({inner}\)|\"\$\({inner}\)\""
    posix = shell in ("sh", "dash", "fish")
    files = "" if posix else rf"|<\({inner}\)"
    word = f"({_LETTER}|{_QUOTED}|{_VALUE}|{_SIGN}|{nested})+"
    around = rf"2>&1|[0-9&]?>>? ?{plain}|< ?{plain}"
    setting = "" if shell == "fish" else f"([A-Z_]+=({_LETTER}|{_QUOTED})* )*"
    call = f"{setting}{program}( ({word}{files}|{around})){{0,{_MOST_WORDS}}}"
    chain = f"{call}(({_BETWEEN}){call}){{0,4}}"
    if shell == "fish":
        return rf"{chain}\n?"
    loop = rf"for [a-z]+ in {word}( {word}){{0,{_MOST_WORDS}}}; do {chain}; done"
    return rf"({chain}|{loop})\n?"
