"""From a request to commands: what the model is shown, what its answer says, and whether that is a command here.

Takes an engine, a request and a place (shell, system, the programs that are there); gives lines that parse and whose
command words are all there. A small model errs often, so it is asked again: first the likeliest answer, then sampled
ones, then after other examples. Runs nothing, prints nothing; whether a line is dangerous is danger.py's to say.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from longspec.cli.danger import programs
from longspec.cli.syntax import BEYOND_FISH, functions, joined, kinds, parse

if TYPE_CHECKING:
    from longspec.engine import Engine, Options

__all__ = ["SHELLS", "Place", "Try", "answered", "examples", "fits", "likest", "suggest", "tries"]

SHELLS = ("bash", "zsh", "fish", "sh", "dash", "ksh")
_MOST_TOKENS = 64
_MOST_CHARACTERS = 1000
_SECONDS = 5.0

# Each shell's own commands. A keyword is the grammar's to know, except where a command may follow it.
_BUILTINS = set(
    ". : [ alias bg break cd command continue echo eval exec exit export false fg getopts hash jobs kill printf pwd read "
    "readonly return set shift test times trap true type ulimit umask unalias unset wait time not and or".split()
)
_MORE_BUILTINS = {
    "bash": set("bind builtin caller compgen complete coproc declare dirs disown enable help history let local logout mapfile "
                "popd pushd readarray shopt source suspend typeset".split()),
    "zsh": set("autoload bindkey builtin compdef coproc declare dirs disown emulate fc float functions history integer let "
               "local logout noglob popd print pushd rehash setopt source suspend typeset unfunction unsetopt vared whence "
               "where which zmodload zparseopts zstyle".split()),
    "fish": set("abbr argparse begin bind builtin complete contains count disown emit functions funced funcsave history math "
                "popd pushd random realpath set_color source status string type string".split()),
    "ksh": set("builtin let print source typeset whence history".split()),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where the command is to run. find: the path of a program, or None."""

    shell: str
    system: str
    find: Callable[[str], str | None] = field(default=shutil.which)

    def has(self, name: str) -> bool:
        """Whether the word begins a command here."""
        builtins = _BUILTINS | _MORE_BUILTINS.get(self.shell, set())
        return name in builtins or self.find(os.path.expanduser(name)) is not None


@dataclass(frozen=True, slots=True)
class Try:
    """One way to ask: how many examples, which of them are left out, and how the answer is sampled."""

    shown: int
    skipped: int = 0
    temperature: float = 0.0
    seed: int = 0


def tries(seed: int = 0) -> list[Try]:
    """Greedy first, then sampled, then after other examples."""
    return [
        Try(8),
        *(Try(8, temperature=0.6, seed=seed + i) for i in range(3)),
        Try(4),
        Try(8, skipped=1),
        *(Try(12, temperature=0.9, seed=seed + i) for i in range(3, 7)),
    ]


@cache
def _template() -> tuple[str, tuple[tuple[str, str], ...]]:
    """The system message, and the examples: requests with their commands."""
    text = (files("longspec.prompts") / "command.md").read_text(encoding="utf-8")
    body = text.split("\n+++\n", 1)[-1]
    system, *pairs = re.split(r"^# ", body, flags=re.MULTILINE)
    split = [pair.strip().split("\n", 1) for pair in pairs]
    return " ".join(system.split()), tuple((request, command) for request, command in split)


def examples(place: Place) -> list[tuple[str, str]]:
    """Those whose commands are commands here: a model repeats what it is shown."""
    return [(request, command) for request, command in _template()[1] if is_command(command, place)]


def likest(pairs: Sequence[tuple[str, str]], request: str, count: int) -> list[tuple[str, str]]:
    """The examples whose requests share most with this one, by rare words; the nearest last, where it weighs most."""
    stems = [_stems(each) for each, _ in pairs]
    found = Counter(stem for each in stems for stem in each)
    weight = {stem: math.log(1 + len(pairs) / number) for stem, number in found.items()}
    asked = _stems(request)

    def nearness(each: set[str]) -> float:
        shared = sum(weight[stem] for stem in each & asked)
        return shared / math.sqrt(1 + sum(weight[stem] for stem in each))

    order = sorted(range(len(pairs)), key=lambda i: nearness(stems[i]))
    return [pairs[i] for i in order[-count:]] if count else []


def _stems(text: str) -> set[str]:
    """Words by their beginnings, and what kind of thing a name or a number is."""
    words = re.findall(r"[a-z]+", re.sub(r"\S*\w\.[a-z]\w*|\S*/\S*", _kind, text.lower()))
    found = {re.sub(r"(ing|ed|es|s|e)$", "", word) if len(word) > 4 else word.rstrip("s") for word in words}
    return found | ({"#"} if re.search(r"\d", text) else set())


def _kind(match: re.Match[str]) -> str:
    return f" {match[0].rsplit('.', 1)[-1]} file " if "://" not in match[0] else " url "


def messages(request: str, place: Place, one: Try) -> list[dict[str, str]]:
    """The conversation in which the model gives a command."""
    system, _ = _template()
    shown = likest(examples(place), request, one.shown + one.skipped)
    shown = shown[: len(shown) - one.skipped]
    said = [{"role": "system", "content": system.format(shell=place.shell, system=place.system)}]
    for asked, command in shown:
        said += [{"role": "user", "content": asked}, {"role": "assistant", "content": command}]
    return [*said, {"role": "user", "content": request}]


def answered(text: str, place: Place) -> str | None:
    """The command in a model's answer: its first block of code if that is one, else its first line that is one."""
    fence = re.search(r"^\s*(`{3,}|~{3,})[^\n`]*\n(.*?)(^\s*\1|\Z)", text, re.DOTALL | re.MULTILINE)
    body = fence[2] if fence else text
    whole = joined(body.strip())
    for line in ([whole] if whole else []) + body.splitlines():
        line = re.sub(r"^\s*(\$|%|>|#!\S+)\s+", "", line.strip())
        if re.fullmatch(r"`[^`]+`", line):
            line = line[1:-1].strip()
        if is_command(line, place):
            return line
    return None


def is_command(line: str, place: Place) -> bool:
    """One line that this shell reads, of commands that are there, and no sentence."""
    if not line or len(line) > _MOST_CHARACTERS or not line.isprintable() or line.startswith("#"):
        return False
    if re.search(r"[A-Za-z]{2}[.:!?]$", line) and len(line.split()) > 3:
        return False
    root = parse(line)
    if root is None or (place.shell == "fish" and (kinds(root) & BEYOND_FISH or "`" in line)):
        return False
    if place.shell in ("sh", "dash") and kinds(root) & {"process_substitution", "herestring_redirect", "ansi_c_string"}:
        return False
    words, own = list(programs(line)), functions(root)
    if not words or not all(word.known and (word.text in own or place.has(word.text)) for word in words):
        return False
    return _reads(line, place)


@cache
def _reads_line(path: str, shell: str, line: str) -> bool:
    without = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}.get(shell, [])
    kept = {name: value for name, value in os.environ.items() if name not in ("BASH_ENV", "ENV")}
    try:
        done = subprocess.run(  # noqa: S603  -n reads and runs nothing
            [path, *without, "-n", "-c", line], env=kept, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _reads(line: str, place: Place) -> bool:
    """What the shell itself says, where it is here: its grammar has the last word."""
    path = place.find(place.shell)
    return path is None or _reads_line(path, place.shell, line)


_NAME = re.compile(r"https?://\S+|[\w~./-]*\w\.\w+|\"[^\"]+\"|'[^']+'|\b[A-Z_]{3,}\b|\b\d+\b")


def fits(line: str, request: str, shown: Sequence[tuple[str, str]]) -> bool:
    """Whether a line is about this request: it has the names and numbers of it, and none of an example's."""
    named = {name.strip("'\"").rstrip(".,?!") for name in _NAME.findall(request)}
    known_as_kind = {name for name in named if re.fullmatch(r"[A-Z]{2,4}", name)}  # CPU, RAM, PDF
    if any(name not in line for name in named - known_as_kind):
        return False
    borrowed = {name for pair in shown for name in _NAME.findall(pair[0])} - named
    mine = set(_NAME.findall(line))
    return not {name for name in mine & borrowed if name not in request}


def suggest(
    engine: Engine,
    request: str,
    place: Place,
    *,
    count: int = 1,
    seed: int = 0,
    step: Callable[[int], None] = lambda tried: None,
    asked: Sequence[Try] | None = None,
) -> list[str]:
    """Up to `count` distinct commands, the ones that fit the request first; none where no answer was a command.

    step: told, before each token, how many answers there were so far.
    """
    fitting: list[str] = []
    others: list[str] = []
    for tried, one in enumerate(asked or tries(seed)):
        said = messages(request, place, one)
        options: Options = {"max_new_tokens": _MOST_TOKENS, "temperature": one.temperature, "seed": one.seed, "top_p": 0.95}
        if not one.temperature:
            options = {"max_new_tokens": _MOST_TOKENS, "temperature": 0}
        line = _ask(engine, said, options, place, lambda tried=tried: step(tried))
        if line is not None and line not in fitting + others:
            pairs = [(said[i]["content"], said[i + 1]["content"]) for i in range(1, len(said) - 1, 2)]
            (fitting if fits(line, request, pairs) else others).append(line)
        if len(fitting) >= count:
            break
    return [*fitting, *others][:count]


def _ask(
    engine: Engine, said: list[dict[str, str]], options: Options, place: Place, step: Callable[[], None]
) -> str | None:
    """The command in one answer, which ends with the first line that is one."""
    session = engine.open(said, **options)
    for _ in engine.prefill(session):
        step()
    while session.finish_reason is None:
        step()
        engine.step([session])
        text = session.text
        if "\n" in text.strip() and "```" not in text and (line := answered(text.strip().split("\n")[0], place)):
            return line
    return answered(session.text, place)

