"""The target environment of a command, and whether a line is valid there: its syntax for the shell, and its programs.

Takes a shell, a system and a function that finds programs; gives yes or no. Runs nothing but the shell's own syntax
check (`-n`), which runs nothing. Dangers are danger.py's task.
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

# Builtins of each shell; its keywords are part of the grammar, except those that a command may follow.
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
    """A shell and its system. find: a function to the path of a program, or None. folder: the working directory."""

    shell: str
    system: str
    find: Callable[[str], str | None] = field(default=shutil.which)
    folder: Path = Path()

    def has(self, name: str) -> bool:
        """Whether the word is a command in this environment."""
        return name in _COMMON | SHELLS[self.shell] or self.find(os.path.expanduser(name)) is not None

    def means(self, line: str) -> bool:
        """Whether the line parses, and every command word in it is known and available."""
        if not line or len(line) > _MOST_CHARACTERS or not line.isprintable() or (root := parse(line)) is None:
            return False
        beyond = {"fish": BEYOND_FISH, "sh": _BEYOND_SH, "dash": _BEYOND_SH}.get(self.shell, set())
        if kinds(root) & beyond or (self.shell == "fish" and "`" in line):
            return False
        words, own = list(programs(line)), functions(root)
        return bool(words) and all(word.known and (word.text in own or self.has(word.text)) for word in words)

    def reads(self, line: str) -> bool:
        """The shell's own syntax check of a line, if the shell is on this machine."""
        path = self.find(self.shell)
        if path is None:
            return True
        steering = ("BASH_ENV", "ENV")
        try:
            done = subprocess.run(  # noqa: S603  -n checks the syntax and runs nothing
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
        """The command in a model's answer: its code block as one line, else its first line that is a command."""
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
    """The environment on this machine. shell: a name or a path; if left out, that of $SHELL, else sh.

    Raises:
        UsageError: the shell is named, but not supported.
    """
    named = os.path.basename(shell or os.environ.get("SHELL") or "sh")
    if named not in SHELLS:
        if shell is not None:
            raise UsageError(f"--shell is {shell}, which isn't known; give one of {', '.join(SHELLS)}.")
        named = "sh"
    return Place(named, _SYSTEMS.get(platform.system(), platform.system()))
