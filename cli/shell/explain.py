"""One-line descriptions of a line's programs: `whatis`, and the shell's own `help`.

Takes a line; gives one sentence per program. Nothing of the line is run, and no model is asked.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

from longspec.cli.io.progress import printable
from longspec.cli.shell.danger import programs

__all__ = ["explained"]

_SECONDS = 5.0


def explained(line: str) -> Iterator[str]:
    """A description for each program, in order; without a manual page, it refers to the program's --help."""
    for name in dict.fromkeys(word.text for word in programs(line) if word.known):
        said = _said(["whatis", "-l", "--", name]) if re.fullmatch(r"[\w.+-]+", name) else None
        match = re.search(r"\)\s+-\s+(.+)", said or "")
        if match is None and re.fullmatch(r"[\w.:\[]+", name):
            said = _said(["bash", "--norc", "--noprofile", "-c", 'help -d -- "$1"', "help", name])
            match = re.search(r" - (.+)", said or "")
        yield printable(f"{name}: {match[1].strip()}" if match else f"{name}: see {name} --help")


def _said(arguments: list[str]) -> str | None:
    if shutil.which(arguments[0]) is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603  a fixed program, and a name after its options
            arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
