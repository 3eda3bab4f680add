"""Where a command is to run, and whether a line is a command there: its shell reads it, and its programs are there.

Takes a shell, a system and a way to find programs; gives yes or no. Runs nothing but the shell's own check of a line's
grammar (`-n`), which runs nothing. What a line does is danger.py's to say.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from longspec.cli.shell.bash_ast import BEYOND_FISH, functions, joined, kinds, parse
from longspec.cli.shell.danger import programs
from longspec.errors import UsageError

__all__ = ["SHELLS", "Place", "here"]

_MOST_CHARACTERS = 1000
_SECONDS = 5.0
_SYSTEMS = {"Darwin": "macOS"}

# Each shell's own commands; its keywords are the grammar's to know, but for those that a command may follow.
_COMMON = set(
    """
    . : [ alias bg break cd command continue echo eval exec exit export false fg getopts hash jobs kill printf pwd
    read readonly return set shift test times trap true type ulimit umask unalias unset wait time
    """.split()  # noqa: SIM905 - a list would be as many lines as words
)
SHELLS = {
    shell: set(commands.split())
    for shell, commands in {
        "bash": """
            bind builtin caller compgen complete coproc declare dirs disown enable help history let local logout
            mapfile popd pushd readarray shopt source suspend typeset
        """,
        "zsh": """
            autoload bindkey builtin coproc declare dirs disown emulate fc float functions history integer let local
            logout noglob popd print pushd rehash setopt source suspend typeset unfunction unsetopt vared whence where
            which
        """,
        "fish": """
            abbr and argparse begin bind builtin complete contains count disown emit functions history math not or
            popd pushd random realpath set_color source status string
        """,
        "sh": "local",
        "dash": "local",
        "ksh": "builtin let print source typeset whence history",
    }.items()
}
_WITHOUT_SETTINGS = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}
_BEYOND_SH = {"process_substitution", "herestring_redirect", "ansi_c_string", "translated_string"}


@dataclass(frozen=True)
class Place:
    """find: the path of a program, or None. folder: in which the command is to run."""

    shell: str
    system: str
    find: Callable[[str], str | None] = field(default=shutil.which)
    folder: Path = Path()

    def has(self, name: str) -> bool:
        """Whether the word begins a command here."""
        return name in _COMMON | SHELLS[self.shell] or self.find(os.path.expanduser(name)) is not None

    def means(self, line: str) -> bool:
        """Whether the grammar knows the line, and every command word in it is known and there."""
        if not line or len(line) > _MOST_CHARACTERS or not line.isprintable() or (root := parse(line)) is None:
            return False
        beyond = {"fish": BEYOND_FISH, "sh": _BEYOND_SH, "dash": _BEYOND_SH}.get(self.shell, set())
        if kinds(root) & beyond or (self.shell == "fish" and "`" in line):
            return False
        words, own = list(programs(line)), functions(root)
        return bool(words) and all(word.known and (word.text in own or self.has(word.text)) for word in words)

    def reads(self, line: str) -> bool:
        """What the shell itself says of a line, where it is here."""
        path = self.find(self.shell)
        if path is None:
            return True
        steering = ("BASH_ENV", "ENV")
        try:
            done = subprocess.run(  # noqa: S603  -n reads, and runs nothing
                [path, *_WITHOUT_SETTINGS.get(self.shell, []), "-n", "-c", line],
                env={name: value for name, value in os.environ.items() if name not in steering},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0 and not done.stderr

    def command(self, answer: str) -> str | None:
        """The command in a model's answer: its block of code as one line, else its first line that is a command."""
        fence = re.search(r"^\s*(`{3,}|~{3,})[^\n`]*\n(.*?)(^\s*\1|\Z)", answer, re.DOTALL | re.MULTILINE)
        body = fence[2] if fence else answer
        whole = joined(body.strip()) if fence else None
        for line in [*([whole] if whole else []), *body.splitlines()]:
            line = re.sub(r"^\s*([$%>]|#!\S+)\s+", "", line.strip())
            line = line[1:-1].strip() if re.fullmatch(r"`[^`]+`", line) else line
            if not _is_sentence(line) and self.means(line) and self.reads(line):
                return line
        return None


def _is_sentence(line: str) -> bool:
    return line.startswith("#") or (re.search(r"[A-Za-z]{2}[.:!?]$", line) is not None and len(line.split()) > 3)


def here(shell: str | None) -> Place:
    """The machine we are on. shell: a name or a path; that of $SHELL if it is left out, else sh.

    Raises:
        UsageError: it is named, and not one we know.
    """
    named = os.path.basename(shell or os.environ.get("SHELL") or "sh")
    if named not in SHELLS:
        if shell is not None:
            raise UsageError(f"--shell is {shell}, which isn't known; give one of {', '.join(SHELLS)}.")
        named = "sh"
    return Place(named, _SYSTEMS.get(platform.system(), platform.system()))
