"""Commands for a request: the prompts of the model, and the ranking of its answers.

Takes an engine, a request and an environment; gives lines that are commands there. A small model ranks better than it
generates: its answers, constrained to the form of a command, compete with the nearest examples' own commands, and the
line wins whose description makes the request most probable. Lines that omit names of the request, or contain words
from nowhere, come last. Runs nothing, prints nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from longspec.cli.shell.bash_ast import calls, parse
from longspec.cli.shell.command_regex import form
from longspec.cli.shell.csv_columns import numbered
from longspec.cli.shell.danger import judge, programs
from longspec.cli.shell.environment import Place
from longspec.cli.shell.examples import Pair, names, nearest, template
from longspec.cli.shell.harms import HARMS
from longspec.cli.shell.served import Served
from longspec.cli.shell.usage import interpreters

if TYPE_CHECKING:
    from longspec.engine.engine import Engine
    from longspec.engine.options import Options

__all__ = ["TRIES", "Try", "faults", "suggest"]

_MOST_TOKENS = 48
_PROGRAMS = 12
_CANDIDATES = 12
"""How many examples' commands compete, of those that ask for the same in part."""

_NEAR = 0.2

_ASKED_OF_IT = "You say in a few words what a shell command does."
_EVERY = 27
"""One example of so many is shown to the model before it describes a command."""


@dataclass(frozen=True, slots=True)
class Try:
    """One sampling of the model: the number of examples, and the temperature."""

    shown: int
    temperature: float = 0.0


TRIES = (Try(5), Try(3), Try(5, 0.6), Try(5, 0.8))


def suggest(
    engine: Engine | Served,
    request: str,
    place: Place,
    *,
    count: int = 1,
    seed: int = 0,
    step: Callable[[int], None] = lambda answers: None,
    tries: Sequence[Try] = TRIES,
) -> list[str]:
    """Up to `count` distinct commands, the best first, none with more faults than the best; none where no answer is a
    command.

    step: called with the number of answers so far.
    """
    known = [pair for pair in template()[1] if place.means(pair[1])]
    near = nearest(known, numbered(request, place.folder), _CANDIDATES)
    lines = [command for nearness, (_, command) in near if nearness > _NEAR and place.means(command)]
    regex = form(_programs(known, request, place), place.shell)
    asks: list[tuple[list[dict[str, str]], Options]] = [
        (
            _messages(request, place, [pair for _, pair in near[len(near) - one.shown :]]),
            {"max_new_tokens": _MOST_TOKENS, "temperature": one.temperature, "seed": seed + number, "regex": regex},
        )
        for number, one in enumerate(tries)
    ]
    for answers, (_, answer) in enumerate(engine.generate_many(asks, width=len(asks))):
        step(answers)
        if not isinstance(answer, Exception) and answer.finish_reason == "stop":
            line = place.command(answer.text)
            lines += [line] if line is not None else []
    lines = [line for line in dict.fromkeys(lines) if place.reads(line)]
    step(len(asks))
    said = _scores(engine, [(_description(line, known), request) for line in lines])
    shown = [pair for _, pair in near]
    wrong = {line: faults(line, request, shown) for line in lines}
    worth = {
        line: chance + _LIKE * _built_like(line, near) - _FAULT * wrong[line]
        for line, chance in zip(lines, said, strict=True)
    }
    best = sorted(lines, key=lambda line: worth[line], reverse=True)
    return [line for line in best if wrong[line] <= wrong[best[0]]][:count]


def _scores(engine: Engine | Served, pairs: Sequence[tuple[list[dict[str, str]], str]]) -> list[float]:
    """The mean log-probability of each text's tokens behind its messages, in nats."""
    if isinstance(engine, Served):
        return engine.scores(pairs)
    from longspec.engine.scoring import score

    return score(engine, pairs)


_LIKE = 8.0
_FAULT = 1.0
"""What likeness to an example and a fault weigh, in nats a token of the request: halving or doubling either changes one
or two of the thirty requests that tests/cli/command.toml runs.
"""


def faults(line: str, request: str, shown: Sequence[Pair]) -> int:
    """The number of faults of a line for this request: names and numbers that it lacks, or has from an example; a
    destructive command that wasn't asked for; a sentence; a repeated word; words found neither in the request nor in
    an example.
    """
    wanted, theirs = names(request), {word for _, command in shown for word in _QUOTED.findall(command)}
    found = sum(name not in line for name in wanted)
    found += sum(name not in request and any(name in names(asked) for asked, _ in shown) for name in names(line))
    found += sum(word in theirs and word.lower() not in request.lower() for word in _QUOTED.findall(line))
    found += bool(judge(line)) and not _LOSS.search(request)
    root = parse(line)
    words = [word.text for call in calls(root) for word in call.words[1:]] if root is not None else []
    found += max(Counter(words).values(), default=0) >= _STUTTER
    found += bool(_FILLERS & set(words)) and not _SPEAKS.match(line)
    grounds = " ".join([request.lower(), *(command for _, command in shown)])
    return found + sum(len(word) > 2 and word.lower().strip("'\"") not in grounds for word in set(words))


_STUTTER = 4
_QUOTED = re.compile(r"['\"]([A-Za-z]{3,})['\"]")
_PROSE = "in the of that with is are to which from and this your you file files"
_FILLERS = frozenset(_PROSE.split())
_SPEAKS = re.compile(r"echo|printf|git commit")
_LOSS = re.compile(
    r"\b(delet|remov|eras|kill|stop|end\b|wip|clear|overwrit|mov|renam|sudo|root|force|truncat|shred|format|reset|discard|"
    r"undo|sav|writ|into\b|chang|push|purg|clean|instal|restart|shut|reboot|merg|cop|edit|updat)",
    re.IGNORECASE,
)


def _built_like(line: str, near: Sequence[tuple[float, Pair]]) -> float:
    """The matching ratio of a line's and an example's words, times that example's similarity; the greatest of
    all.
    """
    mine = line.split()
    return max((n * SequenceMatcher(None, mine, command.split()).ratio() for n, (_, command) in near), default=0.0)


def _programs(known: Sequence[Pair], request: str, place: Place) -> set[str]:
    """The programs that a line may call: those of the examples, of the danger table and of other languages, and those
    that the request names.
    """
    told = {word.text for _, command in known for word in programs(command)}
    asked = set(re.findall(r"[a-z][\w.+-]+", request))
    return {name for name in told | set(HARMS) | interpreters() | asked if place.has(name)}


def _messages(request: str, place: Place, shown: Sequence[Pair]) -> list[dict[str, str]]:
    """The chat messages that ask the model for a command."""
    called = list(dict.fromkeys(command.split()[0] for _, command in reversed(shown)))
    called += [word for word in re.findall(r"[a-z][\w.+-]+", request) if place.find(word)]
    system = template()[0].format(
        shell=place.shell, system=place.system, programs=", ".join(dict.fromkeys(called[:_PROGRAMS]))
    )
    said = [{"role": "system", "content": system}]
    for asked, command in shown:
        said += [{"role": "user", "content": asked}, {"role": "assistant", "content": command}]
    return [*said, {"role": "user", "content": request}]


def _description(line: str, known: Sequence[Pair]) -> list[dict[str, str]]:
    """The chat messages that ask the model for a command's description. The examples are the same for every request,
    so that none of them favours a line.
    """
    said = [{"role": "system", "content": _ASKED_OF_IT}]
    for asked, command in known[3::_EVERY]:
        said += [{"role": "user", "content": command}, {"role": "assistant", "content": asked}]
    return [*said, {"role": "user", "content": line}]
